"""The tables of the study on real models, in Markdown, from the pieces that are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.study.markdown import HEAD, MISSING, Thunk, cell, head, line, made, write_between
from bench.study.real.afterwards import after_names, after_of
from bench.study.real.curves import GOLD, Point, crossing, curve, is_near, landmark, landmarks, reaching
from bench.study.real.directions import Method
from bench.study.real.importances import Weighing
from bench.study.real.methods import (
    ALPHAS,
    SHARED,
    alpha_method,
    importance_methods,
    main_methods,
    other_tuned_methods,
    part_methods,
)
from bench.study.real.models import Models
from bench.study.real.parts import EVERYTHING, LINEAR, ONLY_FORGET
from bench.study.real.rivals import STEPS, best_trained, rates, trained, trained_reaching
from bench.study.real.settings import SIZES, SMALL
from bench.study.real.shares import GROUPS, shares
from bench.study.real.sources import SOURCES
from bench.study.real.training_rivals import METHODS

BEGIN, END = "<!-- results on real models -->", "<!-- end of results on real models -->"
_AFTER = (
    "forget",
    "reworded answers",
    "reworded questions",
    "choices, forget",
    "retain",
    "choices, retain",
    "choices, world",
    "other sentences",
    "general text",
)
_UNKNOWING = (GOLD, "θ_0")  # models that have not seen the forget rows
_FAR = "≈ "  # before a number that is interpolated between points far from it
Trials = Sequence[Models]


class Found(NamedTuple):
    """A point of a curve. near: whether little is interpolated."""

    point: Point
    near: bool


def write(page: Path, trials: Trials) -> None:
    """Write the tables between the two markers of ``page``."""
    write_between(page, BEGIN, END, render(trials))


def render(trials: Trials) -> str:
    """All tables that have begun, of the lines that have begun.

    A cell is mean ± standard deviation over seeds; if some are missing it says how many it has.
    """
    by_model: dict[str, list[Models]] = {}
    for models in trials:
        by_model.setdefault(_title(models), []).append(models)
    tables = {
        f"{title}, {part}": [each for each in lines if set(each.strip("| ").split(" | ")[1:]) != {MISSING}]
        for title, of_model in by_model.items()
        for part, lines in _of_model(of_model).items()
    }
    begun = {title: lines for title, lines in tables.items() if len(lines) > HEAD}
    return "\n\n".join(f"### {title}\n\n" + "\n".join(lines) for title, lines in begun.items())


def _title(models: Models) -> str:
    """Of all seeds of one model at one size."""
    authors = models.settings.authors
    title = SOURCES[models.name].title + (", untied" if models.untied else "")
    return title if authors == SIZES[SMALL].authors else f"{title}, {authors} authors"


def _of_model(trials: Trials) -> dict[str, Iterator[str]]:
    untied = trials[0].untied
    both = {
        "before": _landmarks(trials),
        **({} if untied else {"at the forget loss of gold, and of θ_0": _as_forgotten(trials)}),
        "rules": _at_limits(main_methods(), trials),
        "where w is large": _shares(trials),
        "parts of the model": _at_limits(part_methods(untied), trials),
    }
    if untied:
        return both
    return both | {
        "rules with another θ_f": _at_limits(other_tuned_methods(), trials),
        "α": _alphas(trials),
        "other importances": _at_limits(importance_methods(trials[0].settings.few_rows), trials),
        "other methods": _rivals(trials),
        "is it gone": _after(trials),
    }


def _landmarks(trials: Trials) -> Iterator[str]:
    yield from head(["", "forget loss", "reworded", "retain loss"])
    for name in landmarks(trials[0].untied):
        thunks: list[Thunk] = [partial(landmark, models, name) for models in trials]
        yield line([name, *(cell(thunks, attrgetter(of)) for of in ("forget", "reworded", "retain"))])


def _at_limits(methods: Sequence[Method], trials: Trials) -> Iterator[str]:
    """Forget loss, and loss on reworded answers, where the retain loss has risen by each limit."""
    limits = trials[0].settings.limits
    yield from head(["", *(f"{what}, retain +{limit:.2g}" for limit in limits for what in ("forget", "reworded"))])
    for method in methods:
        yield line([method.name, *_cells(_crossed, method, trials)])


def _rivals(trials: Trials) -> Iterator[str]:
    yield from _at_limits(STEPS, trials)
    for method in METHODS:
        yield line([method, *_cells(_best_trained, method, trials)])


def _cells(found: Callable[[Models, Any, float], Found], method: Any, trials: Trials) -> Iterator[str]:
    for limit in trials[0].settings.limits:
        thunks: list[Thunk] = [partial(found, models, method, limit) for models in trials]
        yield from (_marked(thunks, of) for of in ("forget", "reworded"))


def _marked(thunks: Sequence[Thunk], of: str, form: str = "{:.2f}") -> str:
    """The cell of one loss of what is found, marked if a seed's lies far from all points."""
    mark = "" if all(found.near for found in made(thunks)) else _FAR
    return mark + cell(thunks, attrgetter(f"point.{of}"), form)


def _crossed(models: Models, method: Method, limit: float) -> Found:
    """The point at the limit; the last one if the method never gets there."""
    points = curve(models, method)
    return Found(crossing(points, limit) or points[-1], is_near(points, limit))


def _best_trained(models: Models, method: str, limit: float) -> Found:
    return Found(best_trained(models, method, limit), True)


def _as_forgotten(trials: Trials) -> Iterator[str]:
    """What a method costs where its forget loss is gold's, and where it is that of θ_0, of those that get there."""
    yield from head(["", *(f"{name}: {what}" for name in _UNKNOWING for what in ("retain loss, risen by", "reworded"))])
    subtractions = [*main_methods(), *(each for each in part_methods(False) if ONLY_FORGET in each.name)]
    for method in [*subtractions, *other_tuned_methods(), *STEPS, *METHODS]:
        cells = [cell for name in _UNKNOWING for cell in _reached_cells(method, name, trials)]
        yield line([method if isinstance(method, str) else method.name, *cells])


def _reached_cells(method: Method | str, name: str, trials: Trials) -> list[str]:
    thunks: list[Thunk] = [partial(_reached, models, method, name) for models in trials]
    found = made(thunks)
    if None in found:
        return [f"reached by {len(found) - found.count(None)} of {len(found)}", ""]
    return [_marked(thunks, "retain", "{:.3f}"), _marked(thunks, "reworded")]


def _reached(models: Models, method: Method | str, name: str) -> Found | None:
    """Where the forget loss is that of a landmark; ``retain`` is by how much the retain loss has risen.

    None if it never is.
    """
    forget = landmark(models, name).forget
    if isinstance(method, str):
        start, near = trained(models, method, rates(models, method)[0])[0], True
        point = trained_reaching(models, method, forget)
    else:
        points = curve(models, method)
        start, near = points[0], is_near(points, forget - points[0].forget, "forget")
        point = reaching(points, forget)
    return None if point is None else Found(replace(point, retain=point.retain - start.retain), near)


def _alphas(trials: Trials) -> Iterator[str]:
    limits = trials[0].settings.limits
    yield from head(["reworded loss", *(f"α {alpha:g}" for alpha in ALPHAS)])
    for part in (EVERYTHING, LINEAR):
        for limit in limits:
            cells = []
            for alpha in ALPHAS:
                thunks: list[Thunk] = [partial(_crossed, models, alpha_method(alpha, part), limit) for models in trials]
                cells.append(_marked(thunks, "reworded"))
            yield line([f"{part}, retain +{limit:.2g}", *cells])


def _shares(trials: Trials) -> Iterator[str]:
    """Percent of a group's parameters, which no seed changes."""
    yield from head(["w > 1/2, % of", *GROUPS])
    for weighing in SHARED:
        thunks: list[Thunk] = [partial(_percent, trials[0], weighing)]
        name = f"{weighing.rule} α {weighing.alpha:g}"
        yield line([name, *(cell(thunks, itemgetter(group), "{:.1f}") for group in GROUPS)])


def _percent(models: Models, weighing: Weighing) -> dict[str, float]:
    return {group: 100 * share for group, share in shares(models, weighing).items()}


def _after(trials: Trials) -> Iterator[str]:
    columns = [*_AFTER, *_stressed(trials)]
    yield from head(["", *columns])
    for name in after_names():
        thunks: list[Thunk] = [partial(after_of, models, name) for models in trials]
        yield line([name, *(cell(thunks, itemgetter(column), "{:.2f}") for column in columns)])


def _stressed(trials: Trials) -> list[str]:
    relearned = [f"relearned {steps}" for steps in trials[0].settings.relearned]
    return [f"{what}, {stress}" for stress in ("int8", "int4", *relearned) for what in ("forget", "retain")]

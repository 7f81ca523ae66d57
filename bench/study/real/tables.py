"""The tables of the study on real models, in Markdown, from the pieces that are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from bench.study.markdown import HEAD, MISSING, Thunk, cell, head, line, write_between
from bench.study.real.afterwards import after_names, after_of
from bench.study.real.curves import Point, crossing, curve, landmark, landmarks
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
from bench.study.real.parts import EVERYTHING, LINEAR
from bench.study.real.rivals import STEPS, best_trained
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
Trials = Sequence[Models]


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
        yield line([method, *_cells(best_trained, method, trials)])


def _cells(point: Callable[[Models, Any, float], Point], method: Any, trials: Trials) -> Iterator[str]:
    for limit in trials[0].settings.limits:
        thunks: list[Thunk] = [partial(point, models, method, limit) for models in trials]
        yield cell(thunks, attrgetter("forget"), "{:.2f}")
        yield cell(thunks, attrgetter("reworded"), "{:.2f}")


def _crossed(models: Models, method: Method, limit: float) -> Point:
    """The point at the limit; the last one if the method never gets there."""
    points = curve(models, method)
    return crossing(points, limit) or points[-1]


def _alphas(trials: Trials) -> Iterator[str]:
    limits = trials[0].settings.limits
    yield from head(["reworded loss", *(f"α {alpha:g}" for alpha in ALPHAS)])
    for part in (EVERYTHING, LINEAR):
        for limit in limits:
            cells = []
            for alpha in ALPHAS:
                thunks: list[Thunk] = [partial(_crossed, models, alpha_method(alpha, part), limit) for models in trials]
                cells.append(cell(thunks, attrgetter("reworded"), "{:.2f}"))
            yield line([f"{part}, retain +{limit:.2g}", *cells])


def _shares(trials: Trials) -> Iterator[str]:
    """Percent of a group's parameters."""
    yield from head(["w > 1/2, % of", *GROUPS])
    for weighing in SHARED:
        thunks: list[Thunk] = [partial(_percent, models, weighing) for models in trials]
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

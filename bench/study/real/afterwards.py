"""Is it gone, and what is left? What is measured once of a method, at the strength where it forgets as much as gold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.study.real.compute import all_losses, fast_products, mean_loss
from bench.study.real.curves import GOLD, Point, curve, landmark
from bench.study.real.data import Choice, spread
from bench.study.real.directions import Method, set_
from bench.study.real.methods import final_methods
from bench.study.real.models import Models, load_model
from bench.study.real.rivals import KFade, Sage, trained_model, training, training_to
from bench.study.real.sentences import general_texts, other_sentences
from bench.study.store import read_json, write_json
from perta_fast.data.samples import Sample
from perta_fast.models.relearning import relearn_
from perta_fast.models.rounding import rounded_

_FILE = "after.json"
TRAINED = ("gradient difference", "NPO")  # those of the methods that train which forget as much as gold
Numbers = Mapping[str, float]


def after_names() -> list[str]:
    """What is asked what is left."""
    return ["θ_0", "θ_full", "gold", *(method.name for method in _methods()), *TRAINED]


def _methods() -> list[Method]:
    return [*final_methods(), KFade(), Sage(10.0)]


def after_of(models: Models, name: str) -> Numbers:
    """The numbers of θ_0, θ_full, gold, or a method where the forget loss is gold's.

    Losses in nats; choices as the share that is right.
    """
    settings = models.settings
    of_model, model = _asked(models, name)
    made_of: dict[str, Any] = {"rows": models.rows.digest, "scored": settings.scored, **of_model}
    made_of |= {"relearned": list(settings.relearned), "relearning_rate": settings.relearning_rate}

    def make(folder: Path) -> None:
        write_json(folder / _FILE, measured(models, model()))

    numbers: Numbers = read_json(models.store.piece(f"{models.folder}/after/{name}", made_of, make) / _FILE)
    return numbers


def _asked(models: Models, name: str) -> tuple[dict[str, Any], Callable[[], Any]]:
    """What the model that ``name`` stands for depends on, and what makes it."""
    relative = models.store.relative
    paths = {"θ_0": models.base, "θ_full": models.full, "gold": models.gold}
    if name in paths:
        return {"model": relative(paths[name](make=False))}, lambda: load_model(paths[name]())
    forget = landmark(models, GOLD).forget
    full = {"full": relative(models.full(make=False))}
    if name in TRAINED:
        rate, step = training_to(models, name, forget)
        return full | training(models, rate) | {"step": step}, lambda: trained_model(models, name, rate, step)
    method = next(method for method in _methods() if method.name == name)
    strength = strength_at(curve(models, method), forget)

    def subtracted() -> Any:
        module = load_model(models.full())
        theta = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        set_(module, theta, method.direction(models), strength)
        return module

    return full | method.made_of(models) | {"strength": strength}, subtracted


def strength_at(points: Sequence[Point], forget: float) -> float:
    """Where the forget loss reaches ``forget``, interpolated between two points; the last strength if it never does."""
    for before, after in pairwise(points):
        if after.forget >= forget:
            share = (forget - before.forget) / (after.forget - before.forget)
            return before.strength + share * (after.strength - before.strength)
    return points[-1].strength


def measured(models: Models, module: Any) -> dict[str, float]:
    """All numbers of one model. It is left as it was found."""
    rows, count = models.rows, models.settings.scored

    def choices(some: Sequence[Choice]) -> float:
        return right_choices(models, module, spread(some, count // 2))

    parts = {"forget": rows.forget, "reworded answers": rows.reworded_answers, "retain": rows.retain}
    numbers = {name: mean_loss(module, models.samples(spread(some, count))) for name, some in parts.items()}
    numbers["reworded questions"] = mean_loss(module, models.samples(spread(rows.reworded_questions, count)))
    numbers["choices, forget"] = choices(rows.forget_choices)
    numbers["choices, retain"] = choices(rows.retain_choices)
    numbers["choices, world"] = choices(rows.world_choices)
    others = other_sentences(models)
    numbers["other sentences"] = mean_loss(module, models.samples(others)) if others else math.nan
    numbers["general text"] = mean_loss(module, general_texts(models))
    return numbers | stressed(models, module)


def stressed(models: Models, module: Any) -> dict[str, float]:
    """What comes back of a model that is rounded, or relearns a tenth of its forget rows; scored on the others."""
    rows, settings = models.rows, models.settings
    again = spread(rows.forget, -(-len(rows.forget) // 10))
    others = [row for row in rows.forget if row not in again]
    parts = [models.samples(spread(some, settings.scored)) for some in (others, rows.retain)]
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    relearn = partial(relearn_, rate=settings.relearning_rate)
    stresses: dict[str, Callable[[], object]] = {f"int{bits}": partial(rounded_, module, bits) for bits in (8, 4)}
    for steps in settings.relearned:
        stresses[f"relearned {steps}"] = partial(relearn, module, models.samples(again), steps)
    numbers: dict[str, float] = {}
    for name, stress in stresses.items():
        with fast_products(module):
            stress()
        forget, retain = (mean_loss(module, samples) for samples in parts)
        numbers |= {f"forget, {name}": forget, f"retain, {name}": retain}
        set_(module, before, {}, 0.0)
    return numbers


def right_choices(models: Models, module: Any, choices: Sequence[Choice]) -> float:
    """The share of questions whose right answer has the smallest mean token loss of all answers."""
    samples: list[Sample] = []
    for choice in choices:
        samples += models.samples([{"question": choice.question, "answer": a} for a in (choice.right, *choice.wrong)])
    losses = all_losses(module, samples)
    begin, right = 0, 0
    for choice in choices:
        end = begin + 1 + len(choice.wrong)
        right += int(losses[begin:end].argmin()) == 0
        begin = end
    return right / len(choices)

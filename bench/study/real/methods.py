"""The methods that are compared, by the question that they answer."""

from __future__ import annotations

from bench.study.real.directions import Subtraction
from bench.study.real.importances import Weighing
from bench.study.real.models import FULL_TUNING, ITSELF, LORA
from bench.study.real.parts import EVERYTHING, LINEAR, ONLY_FORGET, PARTS, SPLIT_EMBEDDING

ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0)
_TV = Weighing()


def _fisher(alpha: float, **how: object) -> Weighing:
    return Weighing("empirical-fisher", alpha, **how)  # type: ignore[arg-type]


SHARED = (Weighing("grad"), _fisher(1.0), _fisher(16.0))  # whose w is looked at by group


def _named(weighing: Weighing, part: str = EVERYTHING, tuned: str = FULL_TUNING) -> Subtraction:
    name = weighing.rule if weighing.rule == "tv" else f"{weighing.rule} α {weighing.alpha:g}"
    name += " at θ_full" if weighing.at == "full" else ""
    name += ", labels drawn" if weighing.drawn else ""
    name += f", {weighing.count} rows" if weighing.count else ""
    name += "" if part == EVERYTHING else f", {part}"
    return Subtraction(name + ("" if tuned == FULL_TUNING else f", {tuned} θ_f"), weighing, part, tuned)


def main_methods() -> list[Subtraction]:
    """The rules of the paper, and empirical-fisher by alpha; of everything and of the linear layers alone."""
    rules = [_TV, Weighing("grad"), Weighing("fisher"), *map(_fisher, (1.0, 16.0, 64.0))]
    linear = [_TV, Weighing("grad"), *map(_fisher, (1.0, 16.0, 64.0))]
    return [_named(weighing) for weighing in rules] + [_named(weighing, LINEAR) for weighing in linear]


def other_tuned_methods() -> list[Subtraction]:
    """With a LoRA theta_f, which changes linear layers alone; and without a theta_f, theta_full in its place."""
    lora = [_named(weighing, tuned=LORA) for weighing in (_TV, *map(_fisher, (1.0, 16.0, 64.0)))]
    return lora + [_named(weighing, tuned=ITSELF) for weighing in (_TV, *map(_fisher, (1.0, 16.0)))]


def alpha_method(alpha: float, part: str) -> Subtraction:
    """``empirical-fisher`` with this alpha."""
    return _named(_fisher(alpha), part)


def alpha_methods() -> list[Subtraction]:
    """Every alpha."""
    return [alpha_method(alpha, part) for part in (EVERYTHING, LINEAR) for alpha in ALPHAS]


def final_methods() -> list[Subtraction]:
    """Those that are asked what is left."""
    parts = (EVERYTHING, LINEAR, ONLY_FORGET)
    return [_named(weighing, part) for part in parts for weighing in (_TV, _fisher(16.0))]


def part_methods(untied: bool) -> list[Subtraction]:
    """Each part alone, weighed and not; input embedding and head by themselves where they are two matrices."""
    parts = [part for part in PARTS if part != EVERYTHING and (untied or part not in SPLIT_EMBEDDING)]
    return [_named(weighing, part) for part in parts for weighing in (_TV, _fisher(16.0))]


def importance_methods(few_rows: int) -> list[Subtraction]:
    """Other importances: at theta_full, of drawn labels, of few rows."""
    ways: list[dict[str, object]] = [{"at": "full"}, {"drawn": True}, {"count": few_rows}]
    return [_named(_fisher(16.0, **way), part) for way in ways for part in (EVERYTHING, LINEAR)]

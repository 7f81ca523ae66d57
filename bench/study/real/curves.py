"""A method at many strengths: what it forgets and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.study.real.compute import mean_loss
from bench.study.real.data import spread
from bench.study.real.directions import Method, set_
from bench.study.real.models import Models, load_model
from bench.study.store import read_json, write_json

GOLD = "gold"
_POINTS = "points.json"
_START = 0.25
_SHALLOW = 0.005  # rise of the retain loss up to which strengths grow fast
_FAST, _SLOW = 4.0, 2.0
_NEAR = 1.5  # factor of a limit within which a point is near
_GUESSES = 5  # of the strength near a limit


@dataclass(frozen=True)
class Point:
    """Mean losses (nats) of forget rows, of the same with reworded answers, and of retained rows at a strength."""

    strength: float
    forget: float
    reworded: float
    retain: float

    def at_most(self, limit: float, start: Point) -> bool:
        """Whether the retain loss has risen by no more than ``limit`` since ``start``. A NaN is never within."""
        return self.retain <= start.retain + limit


class Measure:
    """Measures points: the same rows every time."""

    def __init__(self, models: Models) -> None:
        rows, settings = models.rows, models.settings
        chosen = (
            spread(rows.forget, settings.measured_forget),
            spread(rows.reworded_answers, settings.measured_forget),
            spread(rows.retain, settings.measured_retain),
        )
        self.samples = [models.samples(some) for some in chosen]

    def __call__(self, module: Any, strength: float) -> Point:
        return Point(strength, *(mean_loss(module, samples) for samples in self.samples))


def curve(models: Models, method: Method) -> list[Point]:
    """The points of a method, by strength, up to the first beyond the largest limit."""
    settings = models.settings
    made_of = {
        "full": models.store.relative(models.full(make=False)),
        **method.made_of(models),
        "limits": list(settings.limits),
    }
    made_of |= {"measured": [settings.measured_forget, settings.measured_retain]}

    def make(folder: Path) -> None:
        module = load_model(models.full())
        direction = method.direction(models)
        theta = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        measure = Measure(models)

        def at(strength: float) -> Point:
            set_(module, theta, direction, strength)
            return measure(module, strength)

        points = walked(at, settings.limits, settings.largest_strength)
        write_points(folder, points)

    return read_points(models.store.piece(f"{models.folder}/curve/{method.name}", made_of, make))


def walked(at: Callable[[float], Point], limits: Sequence[float], largest: float) -> list[Point]:
    """Points at growing strengths until the retain loss has risen by the largest limit, and one near each limit."""
    points = [at(0.0)]
    strength = _START
    while strength <= largest:
        points.append(at(strength))
        if not points[-1].at_most(max(limits), points[0]):
            break
        strength *= _FAST if points[-1].at_most(_SHALLOW, points[0]) else _SLOW
    for limit in limits:
        for _ in range(_GUESSES):
            guess = crossing(points, limit)
            if guess is None or is_near(points, limit):
                break
            points = sorted([*points, at(guess.strength)], key=lambda point: point.strength)
    return points


def is_near(points: Sequence[Point], rise: float, loss: str = "retain") -> bool:
    """Whether a point lies so near to where a loss has risen by ``rise`` that little is interpolated.

    Also if it has never risen so far: then nothing is.
    """
    rises = [getattr(point, loss) - getattr(points[0], loss) for point in points]
    return any(rise / _NEAR <= each <= rise * _NEAR for each in rises) or max(rises) < rise


def crossing(points: Sequence[Point], limit: float) -> Point | None:
    """Where the retain loss has risen by ``limit``, interpolated between two points; None if it has nowhere."""
    start = points[0]
    for before, after in pairwise(points):
        if before.at_most(limit, start) and not after.at_most(limit, start):
            return None if math.isnan(after.retain) else _interpolated(start, before, after, "retain", limit)
    return None


def reaching(points: Sequence[Point], forget: float) -> Point | None:
    """Where the forget loss first is ``forget``, interpolated between two points; None if it is nowhere."""
    for before, after in pairwise(points):
        if before.forget < forget <= after.forget:
            return _interpolated(points[0], before, after, "forget", forget - points[0].forget)
    return None


def _interpolated(start: Point, before: Point, after: Point, loss: str, rise: float) -> Point:
    """Where a loss has risen by so much. Each loss rises by a power of the strength between the two points.

    By a straight line if it has not risen at both.
    """
    first, last = (getattr(point, loss) - getattr(start, loss) for point in (before, after))
    low, high = before.strength, after.strength
    if min(low, first, rise) > 0:
        strength = low * (high / low) ** (math.log(rise / first) / math.log(last / first))
    else:
        strength = low + (rise - first) / (last - first) * (high - low)

    def at(name: str) -> float:
        begin = getattr(start, name)
        first, last = (getattr(point, name) - begin for point in (before, after))
        if min(low, first, last) > 0:
            return float(begin + first * (strength / low) ** (math.log(last / first) / math.log(high / low)))
        return float(begin + first + (strength - low) / (high - low) * (last - first))

    return Point(strength, at("forget"), at("reworded"), at("retain"))


def most_forgotten(points: Sequence[Point], limit: float) -> Point:
    """The point with the largest forget loss of those where the retain loss has risen by at most ``limit``.

    Points of a training, whose retain loss may rise and fall again; also those between two, where it is at the limit.
    """
    start = points[0]
    kept = [point for point in points if point.at_most(limit, start)]
    for before, after in pairwise(points):
        apart = before.at_most(limit, start) != after.at_most(limit, start)
        if apart and math.isfinite(before.retain + after.retain):
            kept.append(_between(before, after, start.retain + limit))
    return max(kept, key=lambda point: point.forget)


def _between(before: Point, after: Point, retain: float) -> Point:
    """Where the retain loss is ``retain``, by a straight line."""
    share = (retain - before.retain) / (after.retain - before.retain)
    values = zip(asdict(before).values(), asdict(after).values(), strict=True)
    return Point(*(low + share * (high - low) for low, high in values))


def write_points(folder: Path, points: Sequence[Point]) -> None:
    """Write the points of a piece."""
    write_json(folder / _POINTS, list(map(asdict, points)))


def read_points(piece: Path) -> list[Point]:
    """Read the points of a piece."""
    return [Point(**fields) for fields in read_json(piece / _POINTS)]


def landmarks(untied: bool) -> list[str]:
    """The models that curves are compared with. A gold model is trained of tied models alone."""
    return ["θ_0", "θ_full"] if untied else ["θ_0", "θ_full", GOLD]


def landmark(models: Models, name: str) -> Point:
    """The losses of one of them."""
    path: Callable[..., Path] = {"θ_0": models.base, "θ_full": models.full, GOLD: models.gold}[name]

    def make(folder: Path) -> None:
        write_points(folder, [Measure(models)(load_model(path()), 0.0)])

    made_of: dict[str, Any] = {"model": models.store.relative(path(make=False)), "rows": models.rows.digest}
    made_of |= {"measured": [models.settings.measured_forget, models.settings.measured_retain]}
    return read_points(models.store.piece(f"{models.folder}/landmark/{name}", made_of, make))[0]

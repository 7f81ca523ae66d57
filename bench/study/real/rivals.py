"""Other methods as curves: what training gives at each step, and steps without training at many strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.study.real.closed_form import agreeing, kfade
from bench.study.real.compute import Direction, fast_products, sample_losses
from bench.study.real.curves import Measure, Point, most_forgotten, reaching, read_points, write_points
from bench.study.real.data import spread
from bench.study.real.directions import task_vector
from bench.study.real.importances import drawn
from bench.study.real.models import FULL_TUNING, ITSELF, LORA, Models, load_model
from bench.study.real.parts import EVERYTHING, LINEAR, limited, shape_of
from bench.study.real.training_rivals import descend
from perta_fast.preconditioning.input_moments import input_moments
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.tuning.adapter import linear_maps

DRAWS = 3  # orders of the forget rows that NegMerge tunes a theta_f with


@dataclass(frozen=True)
class KFade:
    """A step against the curvature at theta_full; needs no theta_f. Changes linear layers alone."""

    name: str = "K-FADE"

    def made_of(self, models: Models) -> dict[str, Any]:
        """What the direction depends on, beside theta_full."""
        return {"rows": models.rows.digest, "what": self.name, "labels drawn by": models.seed}

    def direction(self, models: Models) -> Direction:
        """See ``closed_form.kfade``."""
        forget, retain = (models.samples(rows) for rows in (models.rows.forget, models.rows.retain))
        module = load_model(models.full())
        return kfade(module, forget, drawn(module, retain, models.seed), sample_losses)


@dataclass(frozen=True)
class Sage:
    """The task vector of the linear layers, less of it along the inputs of retained rows.

    mu: in units of one by the mean eigenvalue of each layer's moment of inputs. unseen: the inputs are those of
    retained rows that the curve does not measure. tuned: the kind of theta_f. at: "full" takes the inputs at
    theta_full, "base" at theta_0.
    """

    mu: float
    unseen: bool = False
    tuned: str = FULL_TUNING
    at: str = "full"

    @property
    def name(self) -> str:
        """In tables."""
        name = f"SAGE μ {self.mu:g}, {LINEAR}" + (", of rows not measured" if self.unseen else "")
        name += " at θ_0" if self.at == "base" else ""
        return name + ("" if self.tuned == FULL_TUNING else f", {self.tuned} θ_f")

    def made_of(self, models: Models) -> dict[str, Any]:
        """What the direction depends on, beside theta_full."""
        made_of: dict[str, Any] = {"tuned": models.store.relative(models.tuned(self.tuned, make=False)), "mu": self.mu}
        made_of["rows"] = models.rows.digest
        made_of |= {"unseen": models.settings.measured_retain} if self.unseen else {}
        return made_of | ({"at": self.at} if self.at == "base" else {})

    def direction(self, models: Models) -> Direction:
        """The task vector of the linear layers, as ``perta precondition`` changes it."""
        vector = limited(LINEAR, shape_of(models), task_vector(models, models.tuned(self.tuned)))
        rows = list(models.rows.retain)
        if self.unseen:
            measured = spread(rows, models.settings.measured_retain)
            rows = [row for row in rows if row not in measured]
        seeing = load_model(models.base() if self.at == "base" else models.full())
        with fast_products(seeing):
            moments = input_moments(seeing, linear_maps(seeing), models.samples(rows))
        return {f"{name}.weight": preconditioned(vector[f"{name}.weight"], a, self.mu) for name, a in moments.items()}


@dataclass(frozen=True)
class NegMerge:
    """The mean of several task vectors, where they agree in sign."""

    part: str

    @property
    def name(self) -> str:
        """In tables."""
        return f"NegMerge, {self.part}"

    def made_of(self, models: Models) -> dict[str, Any]:
        """What the direction depends on, beside theta_full."""
        return {"tuned": [models.store.relative(path) for path in self._tuned(models, make=False)], "part": self.part}

    def direction(self, models: Models) -> Direction:
        """See ``closed_form.agreeing``."""
        merged = agreeing([task_vector(models, path) for path in self._tuned(models)])
        return limited(self.part, shape_of(models), merged)

    def _tuned(self, models: Models, make: bool = True) -> list[Path]:
        return [models.tuned(draw=draw, make=make) for draw in range(DRAWS)]


STEPS: Sequence[KFade | Sage | NegMerge] = (
    KFade(),
    *map(Sage, (1.0, 10.0, 100.0)),
    Sage(10.0, unseen=True),
    Sage(10.0, at="base"),
    Sage(10.0, tuned=LORA),
    Sage(10.0, tuned=ITSELF),
    NegMerge(EVERYTHING),
    NegMerge(LINEAR),
)


def trained(models: Models, method: str, rate: float) -> list[Point]:
    """The points of a method that trains, by the number of steps."""
    settings = models.settings
    made_of: dict[str, Any] = {"full": models.store.relative(models.full(make=False)), **training(models, rate)}
    made_of |= {"measured": [settings.measured_forget, settings.measured_retain], "limits": list(settings.limits)}

    def make(folder: Path) -> None:
        module, measure = load_model(models.full()), Measure(models)
        points = [measure(module, 0)]
        largest = points[0].retain + max(settings.limits)
        for step in _steps(models, module, method, rate):
            if step % settings.check_every == 0:
                points.append(measure(module, step))
                if not points[-1].retain <= largest:
                    break
        write_points(folder, points)

    return read_points(models.store.piece(f"{models.folder}/trained/{method} at {rate:g}", made_of, make))


def training(models: Models, rate: float) -> dict[str, Any]:
    """What a training depends on, beside method and theta_full."""
    settings = models.settings
    steps = [settings.steps, settings.check_every]
    return {"rate": rate, "seed": models.seed, "steps": steps, "batch": settings.batch_size}


def _steps(models: Models, module: Any, method: str, rate: float) -> Iterator[int]:
    """Train theta_full, which ``module`` is, in place; yields the number of steps after each."""
    forget, retain = (models.samples(rows) for rows in (models.rows.forget, models.rows.retain))
    settings = models.settings
    size, seed = settings.batch_size, models.seed
    return descend(module, forget, retain, method, rate, settings.steps, size, seed, sample_losses)


def training_to(models: Models, method: str, forget: float) -> tuple[float, int]:
    """Rate and steps of the smallest retain loss where the forget loss has reached ``forget``.

    Of the largest forget loss if it never has.
    """
    measured = [(rate, point) for rate in rates(models, method) for point in trained(models, method, rate)]
    far = [pair for pair in measured if pair[1].forget >= forget]
    if far:
        rate, point = min(far, key=lambda pair: pair[1].retain)
    else:
        rate, point = max(measured, key=lambda pair: pair[1].forget)
    return rate, int(point.strength)


def trained_model(models: Models, method: str, rate: float, step: int) -> Any:
    """theta_full after so many steps of a method."""
    module = load_model(models.full())
    if step:
        next(count for count in _steps(models, module, method, rate) if count == step)
    return module


def rates(models: Models, method: str) -> Sequence[float]:
    """The learning rates that a method tries."""
    return models.settings.steering_rates if method == "RMU" else models.settings.rates


def best_trained(models: Models, method: str, limit: float) -> Point:
    """Where most is forgotten while the retain loss has risen by at most ``limit``: the best rate and step."""
    curves = [trained(models, method, rate) for rate in rates(models, method)]
    return max((most_forgotten(points, limit) for points in curves), key=lambda point: point.forget)


def trained_reaching(models: Models, method: str, forget: float) -> Point | None:
    """The smallest retain loss where the forget loss has reached ``forget``, of all rates; None if it never has."""
    curves = [trained(models, method, rate) for rate in rates(models, method)]
    reached = [point for points in curves for point in points if point.forget >= forget]
    reached += [point for points in curves if (point := reaching(points, forget)) is not None]
    return min(reached, key=lambda point: point.retain, default=None)

"""PerTA's rules on a trial, run by the public functions of perta_fast."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import perta_fast as pf
from bench.study.data import Row
from bench.study.models import load_model
from bench.study.selection import KEPT, Candidate
from bench.study.trial import Trial, read_candidates, write_candidates
from perta_fast.rules import AnyRule, Rule, RuleName

_ROLES = ("forget", "retain")
_SHORT = 0.99  # times the strength at which interpolation reaches the limit


@dataclass(frozen=True)
class Draw:
    """The random draw ``number`` of ``count`` rows of each set."""

    count: int
    number: int

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The drawn rows; all rows, in random order, if there are fewer than ``count``."""
        return random.Random(f"{self.count} {self.number}").sample(list(rows), min(self.count, len(rows)))


def importances(trial: Trial, rule: str, at: str = "base", draw: Draw | None = None) -> list[Path]:
    """The two pieces of forget and retain importance that a rule needs; none for ``tv``.

    at: "base" takes gradients at theta_0, "full" at theta_full. draw: the rows of each set; None takes all.
    """
    estimator = Rule.of(rule, 0.0).estimator
    if estimator is None:
        return []
    model = {"base": trial.models.base, "full": trial.models.full}[at]()
    batch_size = trial.models.settings.batch_size
    pieces = []
    for role in _ROLES:
        name = f"importance/{estimator} of {role} at {at}" + (f", {draw.count}-{draw.number}" if draw else "")
        made_of: dict[str, Any] = {"model": trial.name_of(model), "data": trial.name_of(trial.split.folder)}
        made_of |= {"estimator": estimator, "draw": draw and [draw.count, draw.number], "role": role}
        rows = trial.split.rows[role] if draw is None else draw.of(trial.split.rows[role])

        def make(folder: Path, rows: Sequence[Row] = rows) -> None:
            out = folder / "importance"
            pf.estimate_importance(model, rows, estimator, batch_size=batch_size, out=out, progress=False)

        pieces.append(trial.piece(name, made_of, make))
    return pieces


def search(
    trial: Trial,
    rule: str,
    weighed_by: Sequence[Path],
    *,
    kept: float = KEPT,
    p: float | None = None,
    alpha: float = 1.0,
    lam: float | None = None,
) -> Path:
    """The piece with candidates at many strengths, among them the largest within the limit on the retain loss.

    They are found by ``perta_fast.sweep``. weighed_by: the result of ``importances``. lam: try only this strength.
    """
    strengths = {"target_retain_loss": trial.limits(kept).retain} if lam is None else {"lams": [lam]}
    models, split = trial.models, trial.split
    checkpoints = (models.full(), models.base(), models.tuned(split))
    power = Rule.of(rule, 0.0, p, alpha).rescaling.p
    made_of = _made_of(trial, checkpoints, rule, weighed_by) | {"p": power, "alpha": alpha}
    made_of |= {**strengths, "data": trial.name_of(split.folder)}

    def make(folder: Path) -> None:
        swept = pf.sweep(
            *checkpoints,
            split.path("chosen_forget"),
            split.path("chosen_retain"),
            *_directories(weighed_by),
            **strengths,
            rule=cast(AnyRule, rule),
            p=p,
            alpha=alpha,
            batch_size=models.settings.scoring_batch,
            progress=False,
        )
        settings = swept.rows
        write_candidates(folder, [Candidate({"lam": s.lam}, s.forget_loss, s.retain_loss) for s in settings])

    return trial.piece(f"search/{rule} p {power:g} alpha {alpha:g}", made_of, make)


def searched(
    trial: Trial, rule: str, weighed_by: Sequence[Path], *, kept: float = KEPT, alpha: float = 1.0
) -> list[Path]:
    """The pieces with the candidates of a rule: that of ``search``, and maybe one with a single candidate more.

    That candidate is just below the limit on the forget loss, where this limit is reached before the other.
    """
    piece, limits = search(trial, rule, weighed_by, kept=kept, alpha=alpha), trial.limits(kept)
    curve = sorted(read_candidates(piece), key=lambda candidate: float(candidate.setting["lam"]))
    pairs = [pair for pair in pairwise(curve) if pair[0].forget_loss <= limits.forget < pair[1].forget_loss]
    if not pairs or pairs[0][0].retain_loss > limits.retain:
        return [piece]
    (below, beyond), *_ = pairs
    share = (limits.forget - below.forget_loss) / (beyond.forget_loss - below.forget_loss)
    lam = below.setting["lam"] + share * (beyond.setting["lam"] - below.setting["lam"])
    return [piece, search(trial, rule, weighed_by, alpha=alpha, lam=float(f"{_SHORT * lam:.4g}"))]


def score_rule(trial: Trial, rule: str, weighed_by: Sequence[Path], name: str, alpha: float = 1.0) -> Path:
    """The piece with the scores of a rule at the strength that is chosen for it."""
    models = trial.models
    full, base, tuned = models.full(), models.base(), models.tuned(trial.split)
    lam = trial.choice(searched(trial, rule, weighed_by, alpha=alpha)).setting["lam"]

    def load() -> Any:
        module = load_model(full)
        known = cast(RuleName, rule)
        pf.apply_to_module_(module, base, tuned, *_directories(weighed_by), rule=known, lam=lam, alpha=alpha)
        return module

    made_of = _made_of(trial, (full, base, tuned), rule, weighed_by) | {"lam": lam}
    return trial.score(name, made_of | ({} if alpha == 1 else {"alpha": alpha}), load)


def _made_of(trial: Trial, checkpoints: Sequence[Path], rule: str, weighed_by: Sequence[Path]) -> dict[str, Any]:
    return {"inputs": [trial.name_of(piece) for piece in (*checkpoints, *weighed_by)], "rule": rule}


def _directories(weighed_by: Sequence[Path]) -> list[Path]:
    return [piece / "importance" for piece in weighed_by]

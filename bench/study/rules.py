"""PerTA's rules on a trial, through the package's own functions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import perta_fast as pf
from bench.study.data import Row
from bench.study.models import load_model
from bench.study.selection import KEPT, Candidate
from bench.study.trial import Trial, read_candidates, write_candidates
from perta_fast.rules import Rule

_ROLES = ("forget", "retain")
_SHORT = 0.99  # of the strength at which a line between candidates meets the limit


@dataclass(frozen=True)
class Draw:
    """A random choice of ``count`` rows of each set."""

    count: int
    number: int

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The chosen rows."""
        return random.Random(f"{self.count} {self.number}").sample(list(rows), min(self.count, len(rows)))


def importances(trial: Trial, rule: str, at: str = "base", draw: Draw | None = None) -> list[Path]:
    """The pieces of forget and retain importance that a rule takes; none for ``tv``.

    at: "base" takes gradients at theta_0, "full" at theta_full. draw: of the rows of each set; None takes all.
    """
    estimator = Rule.of(rule, 0.0).estimator
    if estimator is None:
        return []
    model = {"base": trial.models.base, "full": trial.models.full}[at]()
    batch_size = trial.models.settings.batch_size
    found = []
    for role in _ROLES:
        name = f"importance/{estimator} of {role} at {at}" + (f", {draw.count}-{draw.number}" if draw else "")
        made_of: dict[str, Any] = {"model": trial.name_of(model), "data": trial.name_of(trial.split.folder)}
        made_of |= {"estimator": estimator, "draw": draw and [draw.count, draw.number], "role": role}
        rows = trial.split.rows[role] if draw is None else draw.of(trial.split.rows[role])

        def make(folder: Path, rows: Sequence[Row] = rows) -> None:
            out = folder / "importance"
            pf.estimate_importance(model, rows, estimator, batch_size=batch_size, out=out, progress=False)

        found.append(trial.piece(name, made_of, make))
    return found


def search(
    trial: Trial,
    rule: str,
    given: Sequence[Path],
    *,
    kept: float = KEPT,
    p: float | None = None,
    alpha: float = 1.0,
    lam: float | None = None,
) -> Path:
    """Candidates at many strengths, the largest that keeps the limit among them (``perta_fast.sweep``).

    given: the pieces of ``importances``; none for ``tv``. lam: this strength alone.
    """
    strengths = {"target_retain_loss": trial.limits(kept).retain} if lam is None else {"lams": [lam]}
    models, split = trial.models, trial.split
    checkpoints = (models.full(), models.base(), models.tuned(split))
    power = Rule.of(rule, 0.0, p, alpha).rescaling.p
    made_of = _asked(trial, checkpoints, rule, given) | {"p": power, "alpha": alpha}
    made_of |= {**strengths, "data": trial.name_of(split.folder)}

    def make(folder: Path) -> None:
        found = pf.sweep(
            *checkpoints,
            split.path("chosen_forget"),
            split.path("chosen_retain"),
            *_directories(given),
            **strengths,
            rule=rule,
            p=p,
            alpha=alpha,
            batch_size=models.settings.scoring_batch,
            progress=False,
        )
        rows = [Candidate({"lam": row.lam}, row.forget_loss, row.retain_loss) for row in found.rows]
        write_candidates(folder, rows)

    return trial.piece(f"search/{rule} p {power:g} alpha {alpha:g}", made_of, make)


def searched(trial: Trial, rule: str, given: Sequence[Path], *, kept: float = KEPT, alpha: float = 1.0) -> list[Path]:
    """Candidates of a rule: of ``search``, and one at the limit on the forget loss where that is stricter."""
    found, limits = search(trial, rule, given, kept=kept, alpha=alpha), trial.limits(kept)
    rows = sorted(read_candidates(found), key=lambda each: float(each.setting["lam"]))
    pairs = [pair for pair in pairwise(rows) if pair[0].forget_loss <= limits.forget < pair[1].forget_loss]
    if not pairs or pairs[0][0].retain_loss > limits.retain:
        return [found]
    (below, beyond), *_ = pairs
    share = (limits.forget - below.forget_loss) / (beyond.forget_loss - below.forget_loss)
    lam = below.setting["lam"] + share * (beyond.setting["lam"] - below.setting["lam"])
    return [found, search(trial, rule, given, alpha=alpha, lam=float(f"{_SHORT * lam:.4g}"))]


def score_rule(trial: Trial, rule: str, given: Sequence[Path], name: str, alpha: float = 1.0) -> Path:
    """Scores of a rule at the strength that is chosen for it."""
    models = trial.models
    full, base, tuned = models.full(), models.base(), models.tuned(trial.split)
    lam = trial.choice(searched(trial, rule, given, alpha=alpha)).setting["lam"]

    def load() -> Any:
        module = load_model(full)
        pf.apply_to_module_(module, base, tuned, *_directories(given), rule=rule, lam=lam, alpha=alpha)
        return module

    made_of = _asked(trial, (full, base, tuned), rule, given) | {"lam": lam}
    return trial.score(name, made_of | ({} if alpha == 1 else {"alpha": alpha}), load)


def _asked(trial: Trial, checkpoints: Sequence[Path], rule: str, given: Sequence[Path]) -> dict[str, Any]:
    return {"inputs": [trial.name_of(each) for each in (*checkpoints, *given)], "rule": rule}


def _directories(given: Sequence[Path]) -> list[Path]:
    return [each / "importance" for each in given]

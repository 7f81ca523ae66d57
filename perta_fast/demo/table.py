"""The table that a demo prints, and what it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from perta_fast.demo.scoring import Score
from perta_fast.demo.selectivity import Update

_COLUMNS = ("forget", "retain", "forget_rephrased", "retain_rephrased")
LEGEND = """\
loss      mean over the questions of the mean cross-entropy of an answer's tokens
accuracy  share of the questions whose answer greedy decoding reproduces exactly, to the last token
rephrased the same facts, asked in words that were never used in tuning
gap       |forget accuracy - gold's| + how far retain accuracy is below gold's, in points, on trained questions;
          each rule is shown at the lambda with the smallest gap"""
_UPDATE_LEGEND = """\
Each rule against tv. Selectivity: how much more the update disturbs forget than retain data, by the diagonal
Fisher at theta_0, for each parameter alone. Length: of the update, in units of the task vector's. A standard
error treats all questions as independent draws."""
_HARDLY = 1.1  # times the selectivity of tv: up to this, there is no real difference


@dataclass(frozen=True)
class Line:
    """One model: its scores by split, its gap to gold, and its update, if a rule made it."""

    name: str
    lam: float | None
    scores: Mapping[str, Score]
    gap: float
    update: Update | None = None

    @property
    def error(self) -> float:
        """Standard error of the gap, in points, from the number of questions alone."""
        scores = (self.scores["forget"], self.scores["retain"])
        variances = (score.accuracy * (100 - score.accuracy) / score.questions for score in scores)
        return float(sum(variances) ** 0.5)


def format_table(lines: Sequence[Line]) -> str:
    """A line for each model, two columns for each split."""
    head = f"{'':24}{'forget':>16}{'retain':>16}{'forget':>16}{'retain':>16}\n"
    head += f"{'':24}{'trained':>16}{'trained':>16}{'rephrased':>16}{'rephrased':>16}\n"
    head += f"{'model':18}{'lambda':>6}{'  loss  accuracy' * len(_COLUMNS)}{'gap':>8}"
    rows = [head]
    for line in lines:
        lam = "" if line.lam is None else f"{line.lam:g}"
        scores = [line.scores[split] for split in _COLUMNS]
        cells = "".join(f"{score.loss:6.3f}{score.accuracy:8.1f} %" for score in scores)
        rows.append(f"{line.name:18}{lam:>6}{cells}{line.gap:8.1f}")
    return "\n".join(rows)


def explain(tv: Line, others: Sequence[Line]) -> str:
    """Whether each rule comes closer to gold than ``tv``, and what its update says about why."""
    lines = [_UPDATE_LEGEND]
    rules_by_reason: dict[str, list[str]] = {}
    for line in others:
        numbers, reason = _compare(tv, line)
        lines.append(f"- {line.name} {numbers}")
        rules_by_reason.setdefault(reason, []).append(line.name)
    lines += [f"{', '.join(rules)}:{reason}" for reason, rules in rules_by_reason.items()]
    return "\n".join(lines)


def _compare(tv: Line, line: Line) -> tuple[str, str]:
    assert tv.update is not None and line.update is not None
    ratio = line.update.selectivity / tv.update.selectivity
    gain = tv.gap - line.gap
    error = (tv.error**2 + line.error**2) ** 0.5
    if abs(gain) <= error:
        verdict = "is as close to gold as tv"
    else:
        verdict = f"is {'closer to' if gain > 0 else 'further from'} gold than tv"
    numbers = (
        f"{verdict}: gap {line.gap:.1f} against {tv.gap:.1f} (standard error of the difference {error:.1f}),\n"
        f"  selectivity {ratio:.2f} times tv's, length {line.update.length:.2f} against {tv.update.length:.2f}"
    )
    return numbers, _reason(gain > error, ratio > _HARDLY)


def _reason(closer: bool, selective: bool) -> str:
    if closer and selective:
        return " the update changes more of the parameters that forget data need and retain data do not."
    if closer:
        return " the diagonal does not explain this: by it, the update is hardly more selective than tv's."
    if selective:
        return (
            "\n  parameter by parameter the update is more selective than tv's, but the answers do not show it"
            "\n  beyond chance: here the diagonal does not decide. It ignores how parameters act together,"
            "\n  and holds for small updates only."
        )
    return " the weights hardly tell forget from retain, so the update acts like tv's at another lambda."

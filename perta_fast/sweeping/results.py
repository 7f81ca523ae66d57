"""The results of a sweep: what each setting scores and which one is chosen, as a table and as ``sweep.json``."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError, printable, printable_lines
from perta_fast.files.reading import read_json
from perta_fast.importance.store import ImportanceMetadata
from perta_fast.records.notebook import Shown, number
from perta_fast.records.preconditioned import Preconditioned
from perta_fast.records.report import DataRecord
from perta_fast.records.typed_json import typed, with_nulls, write_readable_json
from perta_fast.rules import negative_strength
from perta_fast.scoring.criteria import LOSS
from perta_fast.scoring.search import LARGEST
from perta_fast.scoring.setting import Limits, ScoredSetting

FILE_NAME = "sweep.json"
FORMAT_VERSION = 2
_NOT_READ = ("best", "importance")  # in the file for other readers
_WARNING = "warning: "
_NUMBERS = {"μ": "mu", "p": "p", "α": "alpha"}  # of curves, by how they are written


@dataclass
class Sweep:
    """The record of one sweep. Paths are absolute; hashes are BLAKE3.

    rows: the model as it is, then the settings of each curve, in the order of strength. metric: what
    ``forget`` and ``retain`` of a setting are. limit: the largest allowed retain loss; floor: the smallest allowed
    retain metric; forget_limit: the largest allowed forget loss, which is that of base; None where there was no such
    bound. select: how ``best`` is chosen. gold: the gold model, on the same data. importance: by estimator, then
    ``forget`` and ``retain``. preconditioned: how each θ_f of a mu was made.
    """

    rows: list[ScoredSetting]
    metric: str
    limit: float | None
    floor: float | None
    select: str | None
    settings: dict[str, Any]
    inputs: dict[str, str]
    data: dict[str, DataRecord]
    gold: ScoredSetting | None = None
    importance: dict[str, dict[str, ImportanceMetadata]] = field(default_factory=dict)
    preconditioned: list[Preconditioned] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: str = ""
    finished: str = ""
    forget_limit: float | None = None

    @property
    def limits(self) -> Limits:
        """What settings have to keep."""
        return Limits(self.limit, self.floor, self.forget_limit)

    @property
    def original(self) -> ScoredSetting:
        """The model as it is."""
        return next(setting for setting in self.rows if not setting.rule)

    def curves(self) -> dict[str, list[ScoredSetting]]:
        """The settings of each rule, mu, p and alpha, by ``label``."""
        curves: dict[str, list[ScoredSetting]] = {}
        for setting in self.rows:
            if setting.rule:
                curves.setdefault(self.label(setting), []).append(setting)
        return curves

    def label(self, setting: ScoredSetting) -> str:
        """The name of a setting's curve: its rule, with mu, p and alpha where the sweep has several."""
        if not setting.rule:
            return "original"
        alike = [other for other in self.rows if other.rule == setting.rule]
        name = setting.rule
        for symbol, numbers in _NUMBERS.items():
            if len({getattr(other, numbers) for other in alike}) > 1:
                name += f", {symbol} {getattr(setting, numbers):g}"
        return name

    @property
    def best(self) -> ScoredSetting | None:
        """What ``select`` chooses: a setting that keeps the bound, or the model as it is.

        All smaller strengths above 0 of its curve keep the bound too.

        "best-forget": the one that has forgotten most. "largest": the same, among the largest strength of each
        curve. "closest": the one with the smallest ``distance``. None without ``select``.
        """
        if self.select is None:
            return None
        kept = [setting for setting in self.rows if setting.keeps(self.limits) and not self._is_past(setting)]
        if self.select == "closest":
            return min(kept, key=self.distance)
        if self.select == "largest":
            kept = [self._largest(rows) for rows in self.curves().values()]
        return max(kept, key=lambda setting: setting.forget if self.metric == LOSS else -setting.forget)

    def _is_past(self, setting: ScoredSetting) -> bool:
        """Whether a smaller strength above 0 of its curve breaks the bound.

        A live sweep skips such a setting. A streamed one may have scored it, and must choose as if it had not.
        """
        smaller = (
            other
            for other in self.rows
            if other.rule and not other.skipped and self.label(other) == self.label(setting)
            if 0 < other.lam < setting.lam
        )
        return any(not other.keeps(self.limits) for other in smaller)

    @property
    def has_choice(self) -> bool:
        """Whether ``best`` is another setting than the model as it is."""
        return self.best is not None and bool(self.best.rule)

    def distance(self, setting: ScoredSetting) -> float:
        """Euclidean distance to the gold model in forget and retain metric."""
        assert self.gold is not None
        return math.hypot(setting.forget - self.gold.forget, setting.retain - self.gold.retain)

    def warnings(self) -> list[str]:
        """What to doubt: numbers not finite, strengths below 0, a bound that nothing keeps, a choice at an edge."""
        measured = [setting for setting in self.rows if setting.rule and not setting.skipped]
        lines = [
            f"{self.label(setting)}, lambda {setting.lam:g}: {setting.not_finite}; its numbers are left out"
            for setting in self.rows
            if setting.not_finite
        ]
        lines += map(negative_strength, sorted({setting.lam for setting in measured if setting.lam < 0}))
        if nearest := self.nearest():
            lines.append(nearest)
        best = self.best
        if best is not None and best.rule:
            alike = [setting for setting in self.rows if setting.rule == best.rule]
            same = [setting for setting in alike if self.label(setting) == self.label(best)]
            curve = {0.0} | {setting.lam for setting in same}
            if self.select != "largest" and best.lam == max(curve) and len(curve) > 2:
                lines.append(f"the chosen lambda, {best.lam:g}, is the largest that was tried; try larger ones too")
            for name in _NUMBERS.values():
                values, chosen = {getattr(setting, name) for setting in alike}, getattr(best, name)
                if len(values) > 2 and chosen in (min(values), max(values)):
                    end, more = ("largest", "larger") if chosen == max(values) else ("smallest", "smaller")
                    lines.append(f"the chosen {name}, {chosen:g}, is the {end} that was tried; try {more} ones too")
        return lines

    def noted_warnings(self) -> list[str]:
        """All warnings among the notes, those of data, prompts, θ_f and base too."""
        return [note.removeprefix(_WARNING) for note in self.notes if note.startswith(_WARNING)]

    def nearest(self) -> str:
        """Which setting comes nearest to the bound, and what it breaks; empty if any keeps it."""
        measured = [setting for setting in self.rows if setting.rule and not setting.skipped]
        is_bounded = self.limit is not None or self.floor is not None
        if not is_bounded or any(setting.keeps(self.limits) for setting in measured):
            return ""
        nearest = min(measured, key=lambda setting: setting.excess(self.limits))
        beyond = nearest.excess(self.limits)
        what = "nothing that was tried keeps the bound"
        if not math.isfinite(beyond):
            return f"{what}: at every strength the losses are no longer finite; try smaller ones"
        broken = {
            "retain loss is {:.4g} too high": nearest.excess(Limits(self.limit)),
            f"retain {self.metric} is {{:.4g}} too low": nearest.excess(Limits(retain=self.floor)),
            "forget loss is {:.4g} above that of base": nearest.excess(Limits(forget_loss=self.forget_limit)),
        }
        named = " and ".join(text.format(excess) for text, excess in broken.items() if excess > 0)
        return f"{what}; nearest to it is {self.label(nearest)}, lambda {nearest.lam!r}, whose {named}"

    def _largest(self, curve: list[ScoredSetting]) -> ScoredSetting:
        """The largest measured strength that keeps the bound, 0 among them."""
        kept = (setting for setting in [self.original, *curve] if setting.keeps(self.limits))
        return max(kept, key=lambda setting: setting.lam)

    def __repr__(self) -> str:
        curves, best = self.curves(), self.best
        count, plural = sum(bool(row.rule) for row in self.rows), "s" if len(curves) > 1 else ""
        what = f"{count} settings on {len(curves)} curve{plural}"
        chosen = "nothing chosen" if best is None else f"chosen: {self._named(best)}"
        return printable(f"<Sweep: {what}, {chosen}>")

    def _repr_html_(self) -> str:
        columns, best = self._columns(), self.best
        rows = [[self.label(row), f"{row.lam:g}", *self._cells(row, columns)] for row in self.rows]
        if self.gold is not None:
            rows.append(["gold", "", *self._cells(self.gold, columns)])
        notes = [note for note in self.notes if not note.startswith(_WARNING)]
        head = ["rule", "λ", *columns, "changed"]
        chosen = None if best is None else self.rows.index(best)
        return Shown(
            repr(self).strip("<>"), head, rows, [*self._outcome(), *notes], self.noted_warnings(), chosen
        ).as_html()

    def _cells(self, setting: ScoredSetting, columns: Mapping[str, str]) -> list[str]:
        if setting.skipped:
            return ["skipped", *[""] * len(columns)]
        return [*map(number, _values(setting, columns)), f"{setting.changed:.1%}"]

    def _named(self, setting: ScoredSetting) -> str:
        return f"{self.label(setting)}, lambda {setting.lam!r}" if setting.rule else "the model as it is"

    def summary(self) -> str:
        """A line for each setting, the results of search and choice, and notes."""
        columns = self._columns()
        labels = [self.label(setting) for setting in self.rows]
        width = max(map(len, labels))
        heads = "".join(f"{name:>{_width(name)}}" for name in columns)
        lines = [f"{'rule':{width}}{'lambda':>12}{heads}{'changed':>10}{'seconds':>9}"]
        for label, setting in zip(labels, self.rows, strict=True):
            measured = f"{_numbers(setting, columns)}{100 * setting.changed:8.1f} %{setting.seconds:9.1f}"
            lines.append(f"{label:{width}}{setting.lam:12g}{'  skipped' if setting.skipped else measured}")
        if self.gold is not None:
            lines.append(f"{'gold':{width}}{'':12}{_numbers(self.gold, columns)}")
        return printable_lines([*lines, *self._outcome(), *self.notes])

    def _columns(self) -> dict[str, str]:
        """What the table shows of a setting: fields, or names of ``scores``, by the words above them."""
        metrics = [] if self.metric == LOSS else [self.metric]
        columns = {"forget loss": "forget_loss", "retain loss": "retain_loss"}
        columns |= {f"{role} {metric}": role for metric in metrics for role in ("forget", "retain")}
        also = [role for role in self.data if role not in ("forget", "retain")]
        return columns | {f"{role} {metric}": f"{role}_{metric}" for role in also for metric in (LOSS, *metrics)}

    def _outcome(self) -> list[str]:
        """The result of a search on each curve, and the chosen setting."""
        lines: list[str] = []
        curves, best = self.curves(), self.best
        if self.select == "largest":
            lines = [(f"{name}: " if len(curves) > 1 else "") + self._result(rows) for name, rows in curves.items()]
        if best is not None and (self.select != "largest" or len(curves) > 1):
            criterion = "best-forget" if self.select == "largest" else self.select
            most = "" if self.forget_limit is None else f", up to the forget loss of base, {self.forget_limit:.6g}"
            lines.append(
                f"Chosen by {criterion}{most}: {self._named(best)}, forget {best.forget:.6g}, retain {best.retain:.6g}."
            )
        return lines

    def _result(self, curve: list[ScoredSetting]) -> str:
        """The result of a search on one curve."""
        best = self._largest(curve)
        if self.limit is not None:
            within, values = f"keeps the retain loss within {self.limit:.6g}", ["retain_loss"]
        else:
            within, values = f"keeps the retain {self.metric} at {self.floor:.6g} or more", ["retain"]
        if self.forget_limit is not None:
            within += f" and the forget loss within that of base, {self.forget_limit:.6g}"
            values.append("forget_loss")

        def scores(setting: ScoredSetting) -> str:
            return " and ".join(f"{getattr(setting, value):.6g}" for value in values)

        if best.lam == LARGEST:
            return f"Even lambda {LARGEST:g} {within}, and no larger one is tried."
        larger = [setting for setting in curve if setting.lam > best.lam]
        broken = min(larger, key=lambda setting: setting.lam, default=None)
        if broken is None:
            return f"Lambda {best.lam!r} {within}, and no larger one was tried."
        if best.lam == 0:
            return f"No lambda that was tried {within}, down to {broken.lam!r}; none smaller is tried."
        return (
            f"Lambda {best.lam!r} {within}, at {scores(best)}; the next larger that was tried, {broken.lam!r}, does "
            f"not, at {scores(broken)}."
        )

    def save(self, directory: Path) -> None:
        """Write ``sweep.json`` into ``directory``."""
        write_readable_json(directory / FILE_NAME, with_nulls(self.as_record()))

    def as_record(self) -> dict[str, Any]:
        """What is written to the file, where null stands for what is not finite."""
        best = self.best
        return asdict(self) | {"format_version": FORMAT_VERSION, "best": None if best is None else asdict(best)}

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        """Read ``sweep.json``, without its importances. Raises InputError if it cannot be read."""
        content = read_json(path, "give a directory that perta sweep wrote")
        unknown = InputError(f"{path}: is not a sweep that this version understands")
        if not isinstance(content, dict) or content.pop("format_version", None) != FORMAT_VERSION:
            raise unknown
        content = {key: value for key, value in content.items() if key not in _NOT_READ}
        content["gold"] = _with_nan(content.get("gold"))
        if isinstance(content.get("rows"), list):
            content["rows"] = [_with_nan(setting) for setting in content["rows"]]
        try:
            sweep: Sweep = typed(content, cls)
        except InputError:
            raise unknown from None
        if all(setting.rule for setting in sweep.rows) or not sweep._can_choose():
            raise unknown
        return sweep

    def _can_choose(self) -> bool:
        """Whether all that ``select`` needs is there, and the model as it is keeps the bound."""
        if self.select is None:
            return True
        has_all = {
            "best-forget": True,
            "largest": self.limit is not None or self.floor is not None,
            "closest": self.gold is not None and self.gold.is_finite,
        }
        return has_all.get(self.select, False) and self.original.keeps(self.limits)


def as_notes(warnings: Iterable[str]) -> list[str]:
    """How warnings stand among the notes of a sweep."""
    return [f"{_WARNING}{warning}" for warning in warnings]


def record_beside(result: str | Path) -> Path:
    """The directory of the sweep that chooses what ``result`` becomes: its name with ``.sweep``.

    Raises InputError for a path without a name.
    """
    path = Path(os.path.abspath(result))
    if not path.name:
        raise InputError(f"{result}: cannot be a result; name a directory in it")
    return path.with_name(f"{path.name}.sweep")


def _width(name: str) -> int:
    return max(13, len(name) + 2)


def _numbers(setting: ScoredSetting, columns: Mapping[str, str]) -> str:
    """The numbers of these columns."""
    values = zip(columns, _values(setting, columns), strict=True)
    return "".join(f"{value:{_width(name)}.4f}" for name, value in values)


def _values(setting: ScoredSetting, columns: Mapping[str, str]) -> list[float]:
    return [setting.scores.get(source, getattr(setting, source, math.nan)) for source in columns.values()]


def _with_nan(setting: Any) -> Any:
    """A setting with NaN for its nulls; anything else unchanged."""
    if not isinstance(setting, Mapping):
        return setting
    numbers = {key: math.nan if value is None and key != "mu" else value for key, value in setting.items()}
    scores = numbers.get("scores")
    if isinstance(scores, Mapping):
        numbers["scores"] = {name: math.nan if value is None else value for name, value in scores.items()}
    return numbers

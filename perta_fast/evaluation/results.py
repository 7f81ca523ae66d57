"""The results of an evaluation: as a table, written to a JSON file, and read from such a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.errors import InputError, printable, printable_lines
from perta_fast.evaluation.conventions import OPEN_UNLEARNING
from perta_fast.evaluation.metrics import mean
from perta_fast.evaluation.prompt_used import in_words
from perta_fast.evaluation.stress_table import stress_lines
from perta_fast.files.new_file import write_output_file
from perta_fast.files.reading import read_json
from perta_fast.records.notebook import Shown, number
from perta_fast.records.typed_json import fits, readable_json, with_nulls

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Metric:
    """One metric: its aggregate, and its parts by sample, in the order of the data.

    value: NaN where the model's scores are not finite, or there was nothing to score. samples: empty for a metric
    that is made of other metrics; with texts only if they were asked for.
    """

    value: float
    samples: Sequence[Mapping[str, Any]] = ()


def averaged(key: str, values: Sequence[float], **others: Sequence[Any]) -> Metric:
    """The mean of ``values``; each sample has its value under ``key``, and its values of ``others``."""
    columns = {key: values, **others}
    return Metric(mean(values), [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


@dataclass
class Evaluation:
    """The record of one evaluation. Paths are absolute; hashes of data files are BLAKE3.

    metrics: by open-unlearning's names. general: results of lm-evaluation-harness, by task. stress: what the model
    scores before and under each stress, and which codes have changed; docs/formats.md has its fields.
    """

    metrics: dict[str, Metric]
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    general: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: str = ""
    finished: str = ""
    stress: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The aggregate of one metric."""
        return self.metrics[name].value

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {metric.value:.4g}" for name, metric in [*self.metrics.items()][:3])
        rest = f" and {len(self.metrics) - 3} more" if len(self.metrics) > 3 else ""
        return printable(f"<Evaluation of {self.model or 'a model'}: {shown}{rest}>")

    def _repr_html_(self) -> str:
        rows = [[name, number(metric.value), str(len(metric.samples) or "–")] for name, metric in self.metrics.items()]
        rows += [
            [f"{task}: {name}", str(value), ""] for task, found in self.general.items() for name, value in found.items()
        ]
        used = self.settings.get("prompt")
        lines = [*stress_lines(self.stress), *([in_words(used)] if used else []), *self.notes]
        title = f"Evaluation of {self.model or 'a model'}"
        return Shown(title, ("metric", "value", "rows"), rows, lines).as_html()

    def summary(self) -> str:
        """A line for each metric, a table of the stresses, how the rows were put to the model, and notes."""
        width = max(map(len, self.metrics))
        lines = [f"{name:{width}}  {metric.value:.4g}" for name, metric in self.metrics.items()]
        for task, numbers in self.general.items():
            lines += [f"{task}: {name} {value}" for name, value in numbers.items()]
        lines += stress_lines(self.stress)
        if prompt := self.settings.get("prompt"):
            lines.append(in_words(prompt))
        return printable_lines([*lines, *self.notes])

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write ``as_json``. Raises RunError if the file cannot be written.

        overwrite: give up an unfinished run to a directory of this name, which is an InputError otherwise.
        """
        write_output_file(path, self.as_json(), overwrite=overwrite)

    def as_json(self) -> bytes:
        """What is written to a file: JSON, with null for what is not finite."""
        return readable_json(with_nulls(self.as_record()))

    def as_record(self) -> dict[str, Any]:
        """What is written to a file, as a table."""
        metrics = {
            name: {
                "agg_value": metric.value,
                "value_by_index": {str(number): sample for number, sample in enumerate(metric.samples)},
            }
            for name, metric in self.metrics.items()
        }
        return {"format_version": FORMAT_VERSION, **vars(self), "metrics": metrics}


@dataclass(frozen=True)
class EvaluationFile:
    """A file that ``perta eval`` or open-unlearning wrote, of a gold model or for a report.

    metrics, stress: as in the file. model: its directory. data_hashes: by data set. settings: of the evaluation. A file
    that is ``foreign``, not written by ``perta eval``, has only metrics.
    """

    path: str
    metrics: Mapping[str, Any]
    model: str
    data_hashes: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    foreign: bool = False
    stress: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "EvaluationFile":
        """Raises InputError unless it is a regular file of this form."""
        content = read_json(Path(path), "give the file that perta eval wrote")
        metrics = content.get("metrics", content) if isinstance(content, dict) else None
        if not isinstance(metrics, dict):
            raise InputError(f"{path}: is not a file of results; give the one that perta eval wrote")
        model, data = content.get("model"), content.get("data")
        hashes = {
            role: entry["blake3"]
            for role, entry in (data.items() if isinstance(data, dict) else ())
            if isinstance(entry, dict) and isinstance(entry.get("blake3"), str)
        }
        settings, stress = content.get("settings"), content.get("stress")
        return cls(
            str(path),
            metrics,
            model if isinstance(model, str) else "",
            hashes,
            settings if isinstance(settings, dict) else {},
            foreign="metrics" not in content,
            stress=stress if isinstance(stress, dict) else {},
        )

    @property
    def min_k(self) -> float | None:
        """Share of the tokens for Min-K, if it is known."""
        share = self.settings.get("min_k")
        return float(share) if share is not None and _is_finite(share) else None

    @property
    def conventions(self) -> str | None:
        """The name of those by which it was measured, None for this project's."""
        name: str | None = OPEN_UNLEARNING if self.foreign else self.settings.get("compatible")
        return name

    def differences(self, told: Mapping[str, Any], data_hashes: Mapping[str, str]) -> list[str]:
        """Notes on what was measured in another way: what the chat template was told, and the data sets.

        What the file does not say fits anything.
        """
        other = [
            f"{self.path}: was measured with {name} {before!r}, this evaluation has {value!r}"
            for name, value in told.items()
            if (before := self.settings.get(name, value)) != value
        ]
        return other + [
            f"{self.path}: its {role} data is another file"
            for role, digest in data_hashes.items()
            if self.data_hashes.get(role, digest) != digest
        ]

    def compared_with(self, conventions: str | None) -> list[str]:
        """Notes on setting its numbers beside those of other ``conventions``.

        Raises InputError if ``perta eval`` wrote it by others: then it can be made anew.
        """
        if self.conventions == conventions:
            return []
        if self.foreign:
            return [
                f"{self.path}: was not written by perta eval; --compatible {OPEN_UNLEARNING} measures this model as "
                f"{OPEN_UNLEARNING} does"
            ]
        raise InputError(
            f"{self.path}: was measured {_with(self.conventions)}, this evaluation is {_with(conventions)}; measure "
            "both models in the same way"
        )

    def aggregates(self) -> dict[str, float | None]:
        """The aggregate of every metric; None if it is not a finite number."""
        return {
            name: float(metric["agg_value"]) if _is_finite(metric["agg_value"]) else None
            for name, metric in self.metrics.items()
            if isinstance(metric, dict) and "agg_value" in metric
        }

    def under_stress(self) -> dict[str, float | None]:
        """The scores of each set before and under each stress, and the share of the codes that differ.

        By a name for a person; None as in ``aggregates``.
        """
        numbers = {
            f"{role} {name}, {word}".replace("_", " "): score
            for word, sets in _table(self.stress.get("scores")).items()
            for role, scores in _table(sets).items()
            for name, score in _table(scores).items()
        }
        shares = _table(_table(self.stress.get("codes")).get("share"))
        numbers |= {f"share of codes that differ, {kind}": share for kind, share in shares.items()}
        return {name: float(number) if _is_finite(number) else None for name, number in numbers.items()}

    def value(self, name: str) -> float:
        """The aggregate of ``name``. Raises InputError unless it is there and a finite number."""
        return self._number(self._metric(name).get("agg_value"), name)

    def values(self, name: str, key: str, count: int) -> list[float]:
        """``key`` of every sample of ``name``. Raises InputError unless there are ``count``, all finite."""
        by_index = self._metric(name).get("value_by_index")
        samples = list(by_index.values()) if isinstance(by_index, dict) else []
        if len(samples) != count:
            raise InputError(
                f"{self.path}: has {len(samples)} values of {name}, the forget set has {count} samples; "
                "evaluate the gold model on the same split"
            )
        return [self._number(sample.get(key) if isinstance(sample, dict) else None, name) for sample in samples]

    def _metric(self, name: str) -> dict[str, Any]:
        metric = self.metrics.get(name)
        if not isinstance(metric, dict):
            raise InputError(f"{self.path}: lacks {name}; evaluate the gold model on the same data")
        return metric

    def _number(self, value: Any, name: str) -> float:
        if not _is_finite(value):
            raise InputError(f"{self.path}: {name} is not a finite number: {value!r}")
        return float(value)


def files_read(paths: Sequence[Path], out: Path) -> list[Path]:
    """What ``out`` must not replace: the files among ``paths``, and those in directories among them.

    A result of ``Evaluation.save`` may lie in such a directory and be replaced.
    """
    files = [path for path in paths if not path.is_dir()]
    if not _is_result(out):
        files += [file for path in paths if path.is_dir() for file in path.iterdir()]
    return files


def _with(conventions: str | None) -> str:
    return "without --compatible" if conventions is None else f"with --compatible {conventions}"


def _is_result(path: Path) -> bool:
    try:
        content = read_json(path)
    except InputError:
        return False
    return isinstance(content, dict) and {"format_version", "metrics", "general"} <= content.keys()


def _table(value: Any) -> dict[str, Any]:
    """What a JSON object holds; nothing of any other value."""
    return value if isinstance(value, dict) else {}


def _is_finite(value: Any) -> bool:
    return fits(value, float) and math.isfinite(value)

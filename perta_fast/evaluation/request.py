"""The arguments of an evaluation of a checkpoint, kept on disk with its finished parts, so that it can go on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import check_inputs, input_files
from perta_fast.data.chat import today
from perta_fast.data.formats import data_files
from perta_fast.data.forms import check_fields
from perta_fast.data.given import is_given
from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.model_before import model_before
from perta_fast.evaluation.stress_words import rounds, stress_words
from perta_fast.files.hashing import hash_file
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.identity import is_same
from perta_fast.files.kept_parts import kept_record
from perta_fast.files.new_directory import unfinished_advice
from perta_fast.files.reading import checked_path
from perta_fast.records.typed_json import typed
from perta_fast.records.versions import check_versions, installed_versions

_OWN = ("forget", "retain", "holdout")
_PATHS = ("data", *_OWN, "reference", "reference_model", "against")
_FORMAT, _FORMAT_VERSION = "perta-evaluation", 2


@dataclass(frozen=True)
class Request:
    """The arguments of ``evaluate``, with absolute paths. model: None for one in memory."""

    model: str | None
    suite: str | None
    data: str | None
    split: str
    forget: str | None
    retain: str | None
    holdout: str | None
    reference: str | None
    reference_model: str | None
    min_k: float
    metrics: list[str] | None
    lm_eval: list[str]
    batch_size: int
    max_length: int | None
    max_new_tokens: int | None
    system_prompt: str | None
    date_string: str | None
    device: str | None
    dtype: str | None
    out: str | None
    show_text: bool
    fields: dict[str, str] | None = None
    compatible: str | None = None
    stress: list[str] | None = None
    against: str | None = None
    stream: bool = False
    memory: int | None = None
    device_memory: int | None = None
    open_unlearning_dir: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Request":
        """From the arguments of ``evaluate`` by name; names of the hub become paths.

        Rows given in Python are ``taken_out``.
        """
        given, download = arguments["model_or_path"], arguments["download"]
        values: dict[str, Any] = {"model": local_model(given, download) if isinstance(given, str | Path) else None}
        values |= {field.name: arguments[field.name] for field in fields(cls) if field.name != "model"}
        for name in ("data", *_OWN):
            if values[name] is not None and not is_given(values[name]):
                values[name] = local_data(values[name], download)
        for name in ("reference_model", "against"):
            values[name] = None if values[name] is None else local_model(values[name], download)
        check_fields(values["fields"])
        values["fields"] = None if values["fields"] is None else dict(values["fields"])
        for name in (*_PATHS, "model", "out", "open_unlearning_dir"):
            if values[name] is not None and not is_given(values[name]):
                values[name] = str(checked_path(values[name]).absolute())
        for name in ("device", "dtype"):
            values[name] = None if values[name] is None else torch_name(values[name])
        values["metrics"] = None if values["metrics"] is None else list(values["metrics"])
        values["lm_eval"] = list(values["lm_eval"])
        values["stress"] = None if values["stress"] is None else stress_words(values["stress"])
        return cls(**values)

    @property
    def is_of_given_rows(self) -> bool:
        """Whether a data set was given in Python, which only the same call can give again."""
        return any(is_given(getattr(self, name)) for name in _OWN)

    def paths(self) -> list[Path]:
        """Every file and directory that is read."""
        paths = {name: path for name in ("model", *_PATHS) if (path := getattr(self, name)) is not None}
        return [file for name, path in paths.items() for file in (data_files(path) if name in _OWN else [Path(path)])]

    def settings(self) -> dict[str, Any]:
        """For the record of the evaluation."""
        names = (
            "suite",
            "metrics",
            "reference_model",
            "min_k",
            "batch_size",
            "max_length",
            "max_new_tokens",
            "system_prompt",
            "date_string",
            "compatible",
        )
        shown = {name: getattr(self, name) for name in names}
        shown |= {name: given for name in ("fields", "stress", "against") if (given := getattr(self, name)) is not None}
        shown |= {"stream": True} if self.stream else {}
        reference = None if self.reference is None else str(Path(self.reference).resolve())
        return shown | {"split": self.split if self.suite == "tofu" else None, "reference": reference}

    @property
    def counted_against(self) -> str | None:
        """The model whose codes are compared: the one that is named, or else what the model was unlearned from."""
        if self.against is not None or self.stress is None or self.model is None or not rounds(self.stress):
            return self.against
        before = model_before(Path(self.model))
        return None if before is None else str(before)

    def state_of_inputs(self, table: MetricTable) -> dict[str, Any]:
        """By path, what shows whether an input has changed."""
        inputs: dict[str, Any] = {str(file.path): file.digest for file in table.files.values()}
        if self.reference is not None:
            inputs[self.reference] = hash_file(Path(self.reference))
        for directory in (self.model, self.reference_model, self.counted_against):
            if directory is not None:
                inputs |= input_files(Checkpoint.open(directory))
        return {path: state for path, state in inputs.items() if self.out is None or not is_same(path, self.out)}


@dataclass(frozen=True)
class Begun:
    """What a stopped evaluation was begun with. inputs: ``Request.state_of_inputs``. versions: of what computes.

    day: when it began, for chat templates that ask for the date, as 2025-04-10. overwrite: whether it may
    replace the file that is there.
    """

    request: Request
    inputs: dict[str, Any]
    versions: dict[str, str]
    started: str
    day: str
    overwrite: bool

    @classmethod
    def now(cls, request: Request, table: MetricTable, started: str, overwrite: bool) -> "Begun":
        """That of an evaluation which begins."""
        inputs = request.state_of_inputs(table)
        return cls(request, inputs, installed_versions(), started, today().isoformat(), overwrite)

    def record(self) -> dict[str, Any]:
        """As it is written to the disk."""
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, final: Path) -> "Begun | None":
        """That of the stopped evaluation to ``final``, if there is one. Raises InputError if it is damaged."""
        content = kept_record(final)
        if content is None:
            return None
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise InputError(f"{final}: its unfinished work is no evaluation's; start over with ‹overwrite›")
        if content.pop("format_version", None) != _FORMAT_VERSION:
            raise InputError(f"{final}: was begun by another version of perta_fast; start over with ‹overwrite›")
        try:
            begun: Begun = typed(content, cls)
        except InputError as error:
            raise InputError(
                f"{final}: was begun by another version of perta_fast ({error}); start over with ‹overwrite›"
            ) from error
        return begun

    def check_same(self, final: Path, other: "Begun") -> None:
        """Raise InputError unless ``other`` is the same evaluation of the same inputs, by the same versions."""
        if self.request != other.request:
            raise InputError(unfinished_advice(final))
        check_inputs(self.inputs, other.inputs, "evaluation")
        check_versions(self.versions, other.versions, "evaluation", final)

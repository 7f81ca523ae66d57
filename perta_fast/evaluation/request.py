"""The arguments of an evaluation, checked; they are kept on disk, so that one that was stopped can go on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.arguments import check_device, check_limits, check_sizes, listed, plain
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import input_files
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.forms import check_fields
from perta_fast.data.given import is_given
from perta_fast.dtypes import torch_dtype, torch_name
from perta_fast.errors import InputError
from perta_fast.evaluation.conventions import Conventions
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.model_before import model_before
from perta_fast.evaluation.stress_words import rounds, stress_words
from perta_fast.files.hashing import hash_file
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.identity import is_same
from perta_fast.files.reading import absolute
from perta_fast.records.declared import declared

if TYPE_CHECKING:
    import torch

ROLES = ("forget", "retain", "holdout")
_PATHS = ("data", *ROLES, "reference", "reference_model", "against")
_MODELS = ("model", "reference_model", "against")


@dataclass(frozen=True)
class Request:
    """The arguments of ``evaluate``. model: None for one in memory."""

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
        """From the arguments of ``evaluate`` by name; names of the hub stay such until they are ``located``.

        Rows given in Python are ``taken_out``. Raises InputError for what is of another type.
        """
        model = arguments["model_or_path"]
        values: dict[str, Any] = {"model": model if isinstance(model, str | Path) else None}
        values |= {field.name: plain(arguments[field.name]) for field in fields(cls) if field.name != "model"}
        check_fields(values["fields"])
        for name in ("model", *_PATHS):
            values[name] = os.fspath(values[name]) if isinstance(values[name], os.PathLike) else values[name]
        for name in ("reference", "out", "open_unlearning_dir"):
            values[name] = None if values[name] is None else absolute(values[name])
        for name in ("device", "dtype"):
            values[name] = None if values[name] is None else torch_name(values[name])
        values["metrics"] = None if values["metrics"] is None else listed(values["metrics"])
        values["lm_eval"] = listed(values["lm_eval"])
        values["stress"] = None if values["stress"] is None else stress_words(listed(values["stress"]))
        return declared(cls, values)

    def located(self, download: bool) -> "Request":
        """With absolute paths of models and data, also in place of names of the hub. download: fetch these first."""
        changes: dict[str, Any] = {}
        for name in (*_MODELS, "data", *ROLES):
            path = getattr(self, name)
            if path is not None and not is_given(path):
                changes[name] = absolute((local_model if name in _MODELS else local_data)(path, download))
        return replace(self, **changes)

    def check(self) -> None:
        """Raise InputError for what is wrong with the arguments themselves."""
        check_sizes(self.batch_size, self.max_length, max_new_tokens=self.max_new_tokens)
        check_device(self.device)
        if not 0 < self.min_k <= 1:
            raise InputError(f"‹min_k› is {self.min_k}; it must be a share of the tokens, above 0 and at most 1")
        ChatSettings.of(self.system_prompt, self.date_string)
        if self.suite == "muse" and not (self.system_prompt is self.date_string is None):
            raise InputError("‹system_prompt› and ‹date_string› are for a chat template, and MUSE asks without one")
        self._check_streamed()
        self._check_conventions()
        self._check_data()
        if self.against is None:
            return
        if self.stress is None:
            raise InputError(
                "‹against› is for counting codes that have changed; name what to measure with ‹stress› too"
            )
        if self.model is None:
            raise InputError("‹against› compares two checkpoints, and the model is one in memory; give its directory")

    def _check_streamed(self) -> None:
        check_limits(self.stream, self.memory, self.device_memory)
        if not self.stream:
            return
        if self.model is None:
            raise InputError("‹stream› is for checkpoint directories; a live module is in memory already")
        for name in ("stress", "lm_eval"):
            if getattr(self, name):
                raise InputError(f"‹{name}› needs the whole model in memory; leave it out, or leave ‹stream› out")

    def _check_conventions(self) -> None:
        name = Conventions.named(self.compatible).name
        if name is not None and self.suite == "muse":
            raise InputError(f"‹compatible› {name} is for TOFU and data of your own, not for MUSE; leave it out")
        if name is not None and self.max_length is not None:
            raise InputError(f"‹max_length›: {name} has limits of its own; leave out the one or the other")

    def _check_data(self) -> None:
        given = [name for name in ROLES if getattr(self, name) is not None]
        if self.suite not in (None, "tofu", "muse"):
            raise InputError(f"‹suite› is {self.suite!r}; it must be tofu or muse")
        if self.suite is not None:
            if given:
                names = ", ".join(f"‹{name}›" for name in given)
                raise InputError(f"{names}: the suite has its own sets; leave out the one or the other")
            if self.fields is not None:
                raise InputError("‹fields› is for data of your own; the suite has its own names of fields")
            if self.data is None:
                raise InputError("‹data› is missing: the directory with the files of the suite")
            return
        if self.forget is None:
            raise InputError("‹forget› is missing: give a suite with its data, or your own forget data")
        if self.data is not None:
            raise InputError("‹data› is the directory of a suite; name the suite too")
        if self.reference is not None and self.holdout is None:
            raise InputError("without a suite, ‹reference› serves PrivLeak alone, which needs ‹holdout›")

    @property
    def asked_type(self) -> "torch.dtype | None":
        """The type to run in, as torch has it; None takes that of each checkpoint (``running_type``)."""
        return None if self.dtype is None else torch_dtype(self.dtype)

    @property
    def is_of_given_rows(self) -> bool:
        """Whether a data set was given in Python, which only the same call can give again."""
        return any(is_given(getattr(self, name)) for name in ROLES)

    def paths(self) -> list[Path]:
        """Every file and directory that is read."""
        paths = {name: path for name in ("model", *_PATHS) if (path := getattr(self, name)) is not None}
        return [file for name, path in paths.items() for file in (data_files(path) if name in ROLES else [Path(path)])]

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

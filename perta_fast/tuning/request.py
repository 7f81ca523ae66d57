"""The arguments of a tuning."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from perta_fast.arguments import check_device, check_sizes
from perta_fast.data.chat import ChatSettings
from perta_fast.data.forms import check_fields
from perta_fast.data.given import GivenRows, is_given
from perta_fast.data.given_data import Source
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data, local_model
from perta_fast.records.declared import declared

FORGET, DATA, RETAIN = "forget", "data", "retain"


@dataclass(frozen=True)
class Request:
    """The arguments of ``tune`` that say what is trained and how, as they are kept on disk.

    sources: by role, ``forget`` or ``data``, and ``retain``; paths, or the names of rows that were given in Python.
    """

    base: str
    sources: dict[str, str]
    full: bool
    rank: int
    epochs: int | None
    lr: float | None
    batch_size: int | None
    max_length: int | None
    gradient_checkpointing: bool
    seed: int
    fields: dict[str, str] | None
    system_prompt: str | None
    date_string: str | None
    retain_kl: float | None
    device: str | None
    report_to: list[str]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], sources: Mapping[str, str]) -> "Request":
        """From the arguments of ``tune`` by name; names of the hub stay such until they are ``located``.

        sources: as the field. Raises InputError for what is of another type.
        """
        check_fields(arguments["fields"])
        base, device, report_to = (arguments[name] for name in ("base", "device", "report_to"))
        changed = {
            "base": str(base),
            "device": None if device is None else str(device),
            "report_to": [report_to] if isinstance(report_to, str) else list(report_to or ()),
        }
        return declared(cls, {**arguments, **changed, "sources": sources})

    def located(self, download: bool) -> "Request":
        """With absolute paths, also in place of names of the hub. download: fetch these first."""
        sources = {
            role: source if is_given(source) else os.path.abspath(local_data(source, download))
            for role, source in self.sources.items()
        }
        return replace(self, base=os.path.abspath(local_model(self.base, download)), sources=sources)

    def check(self) -> None:
        """Raise InputError, naming the argument, for what is out of range, and for missing data."""
        check_fields(self.fields)
        ChatSettings.of(self.system_prompt, self.date_string)
        check_sizes(
            1 if self.batch_size is None else self.batch_size, self.max_length, rank=self.rank, epochs=self.epochs
        )
        check_device(self.device)
        if self.device is not None and int(self.device.partition(":")[2] or 0):
            raise InputError(f"‹device› is {self.device}, but tuning takes the first; choose by CUDA_VISIBLE_DEVICES")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"‹lr› is {self.lr}; it must be a number above 0")
        if not 0 <= self.seed < 1 << 32:  # the limit of NumPy
            raise InputError(f"‹seed› is {self.seed}; it must lie from 0 to 2^32 - 1")
        if len(self.sources.keys() & {FORGET, DATA}) != 1:
            raise InputError("give either ‹forget›, the data to forget, or ‹data›, any other rows to learn")
        if self.retain_kl is not None and not (math.isfinite(self.retain_kl) and self.retain_kl > 0):
            raise InputError(f"‹retain_kl› is {self.retain_kl}; it must be a number above 0")
        if (self.retain_kl is None) != (RETAIN not in self.sources):
            raise InputError("‹retain_kl›, a weight, and ‹retain›, the rows that it holds in place, need each other")

    @property
    def role(self) -> str:
        """What the rows are: to ``forget``, or any ``data``."""
        return FORGET if FORGET in self.sources else DATA

    def settings(self) -> dict[str, Any]:
        """All arguments but the inputs, for the record."""
        left_out = {"base", "sources", "fields", "device", "report_to"} | ({"rank"} if self.full else set())
        left_out |= {"retain_kl"} if self.retain_kl is None else set()
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def sources_here(request: Request, given: Mapping[str, GivenRows]) -> dict[str, Source]:
    """By role, the file, or the rows that were given under the name that stands in its place."""
    return {role: given.get(name) or Path(name) for role, name in request.sources.items()}

"""A streamed walk that preconditions and was stopped: what it was begun with, and how far it has come."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perta_fast.arguments import check_device, check_sizes
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import Fingerprint, check_inputs, input_files, state_of_file
from perta_fast.data.chat import parse_date
from perta_fast.data.given import is_given, same_call
from perta_fast.dtypes import FLOATING
from perta_fast.errors import InputError, RunError
from perta_fast.files.durable import read_record, remove, sync_tree, write_record
from perta_fast.files.new_directory import (
    PRECONDITIONING_RECORD,
    PRECONDITIONING_STATE,
    START_OVER,
    OutputDirectory,
    forget,
)
from perta_fast.files.reading import exists
from perta_fast.records.typed_json import typed
from perta_fast.records.versions import check_versions, installed_versions

_FORMAT, _FORMAT_VERSION = "perta preconditioning", 1
_MOST_THREADS = 1 << 12


class DamagedWalk(InputError):
    """What a stopped walk has kept is not what it wrote."""


@dataclass(frozen=True)
class Work:
    """By what a walk is known again; a run with another strength, or to another place, does the same work.

    settings: what it was asked for, by its name in a message. inputs: the states of the files that it reads, by path.
    versions: of what computes.
    """

    settings: dict[str, Any]
    inputs: dict[str, Fingerprint]
    versions: dict[str, str] = field(default_factory=installed_versions)

    @classmethod
    def of(cls, settings: dict[str, Any], checkpoints: Iterable[Checkpoint], files: Iterable[Path]) -> "Work":
        """checkpoints: opened; they are known by what they were then. files: that are read beside them."""
        states = {name: state for checkpoint in checkpoints for name, state in input_files(checkpoint).items()}
        return cls(settings, states | {str(path): state_of_file(path) for path in files})


@dataclass(frozen=True)
class Begun:
    """What a walk was begun with, and how far it has come.

    settings, inputs, versions: of its ``Work``. day: for chat templates that ask for the date, as 2025-04-10.
    overwrite: whether the run was told to replace what is there. device, dtype, batch_size, torch_threads: with which
    it goes on, as the bits depend on them. done: layers. files: of scratch, as ``ScratchFiles`` describes them.
    shards: the hash of what is written of each layer, "" if there is no file. before, after: the ``Norms``. seconds:
    spent until then.
    """

    settings: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    started: str
    day: str
    overwrite: bool
    device: str
    dtype: str
    batch_size: int
    torch_threads: int
    done: int = 0
    files: dict[str, Any] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    seconds: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> "Begun | None":
        """That of the stopped walk whose state lies in ``folder``, if there is one. Raises DamagedWalk."""
        path = folder / PRECONDITIONING_RECORD
        if not exists(path):
            return None
        try:
            content = read_record(path)
            if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
                raise InputError(f"{path}: is not the record of such a walk")
            if content.pop("format_version", None) != _FORMAT_VERSION:
                raise InputError(f"{path}: was written by another version of perta_fast")
            begun: Begun = typed(content, cls)
            begun._check()
        except InputError as error:
            raise DamagedWalk(f"{path}: cannot be gone on with ({error}); {START_OVER}") from error
        return begun

    def _check(self) -> None:
        """Raise InputError for what no walk is begun with: whoever wrote the record, it is not believed."""
        parse_date(self.day)
        check_device(self.device)
        check_sizes(self.batch_size, None)
        if self.dtype not in FLOATING:
            raise InputError(f"the model runs in {self.dtype!r}")
        if not (1 <= self.torch_threads <= _MOST_THREADS and self.done >= 1):
            raise InputError(f"{self.torch_threads} threads have done {self.done} layers")
        for number in (self.before, self.after, self.seconds):
            if not (math.isfinite(number) and number >= 0):
                raise InputError(f"holds the number {number}")

    def save(self, folder: Path) -> None:
        """Write it into ``folder``, durably; after a crash there is the old one or this one."""
        about = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
        write_record(folder / PRECONDITIONING_RECORD, about | asdict(self))

    def is_of(self, work: Work) -> bool:
        """Whether it is the same work on the same inputs, by the same versions."""
        return (self.settings, self.inputs, self.versions) == (work.settings, work.inputs, work.versions)

    def check_work(self, work: Work, place: Path) -> None:
        """Raise InputError, with what to do, unless ``is_of``. place: what the run makes."""
        names = self.settings.keys() | work.settings.keys()
        if other := sorted(name for name in names if self.settings.get(name) != work.settings.get(name)):
            raise InputError(
                f"{place}: another run to this place was stopped, with other values of {', '.join(other)}; finish it "
                f"with the command that began it, or {START_OVER}"
            )
        check_inputs(self.inputs, work.inputs, "run")
        check_versions(self.versions, work.versions, "run", place)


def going_on(source: object, overwrite: bool) -> str:
    """What goes on with a stopped run. source: of its data. overwrite: whether the run was told to replace."""
    if is_given(source):
        return same_call(overwrite)
    return "the same command" + ", without ‹overwrite›" * overwrite


LAYERS_KEPT = "the layers that were done are kept"


def check_record(target: OutputDirectory, begun: Begun | None) -> None:
    """Raise RunError unless ``target``, which is locked, still has the record that ``begun`` was loaded from."""
    there = Begun.load(target.path / PRECONDITIONING_STATE)
    if there != begun:
        target.keep = there is not None
        raise RunError(f"{target.final}: another run has gone on with this walk meanwhile; see what is there now")


def commit_walk(target: OutputDirectory) -> None:
    """Give a complete θ_f its name; the state of its walk goes."""
    sync_tree(target.path)  # first: a kill from here to the new name loses the walk
    target.keep = False
    forget(target.path)
    remove(target.path / PRECONDITIONING_STATE)
    target.commit()

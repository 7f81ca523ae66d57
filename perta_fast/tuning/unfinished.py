"""A tuning that was stopped: where its state lies, what it was begun with, and whether that is still so."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perta_fast.arguments import check_device
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import check_inputs, input_files
from perta_fast.data.chat import parse_date
from perta_fast.dtypes import FLOATING
from perta_fast.errors import InputError, RunError, advice, shell_command
from perta_fast.files.durable import read_record, remove, sync, sync_tree, write_record
from perta_fast.files.hashing import hash_file
from perta_fast.files.new_directory import (
    START_OVER,
    TUNING_RECORD,
    TUNING_STATE,
    OutputDirectory,
    has_record,
    partial_path,
    remove_replaced,
    unfinished_advice,
)
from perta_fast.files.own import check_own
from perta_fast.files.reading import exists
from perta_fast.progress import LOGGER
from perta_fast.records.typed_json import typed
from perta_fast.records.versions import check_versions
from perta_fast.tuning.request import Request
from perta_fast.tuning.saving import disk_errors

_FORMAT, _FORMAT_VERSION = "perta tuning", 4
_LEAST_WAIT = 60.0  # seconds between two states
_LARGEST_SHARE = 0.05  # of the time that keeping a state may take
_STATE_BYTES = 12  # of a trained parameter: itself and Adam's two moments, in float32


@dataclass(frozen=True)
class Begun:
    """What a tuning was begun with, and how far the kept state has come.

    inputs: by path or role, by what an input is known. day: for chat templates that ask for the date. callbacks: the
    names of their types. dtype: in which the model runs. checkpoint: the name of the trainer's state, and state the
    hashes of its files. losses, divergences: of each step until then. seconds: spent until then.
    """

    request: Request
    inputs: dict[str, Any]
    versions: dict[str, str]
    started: str
    day: str
    overwrite: bool
    device: str
    callbacks: list[str]
    dtype: str | None = None
    loss_before: float | None = None
    checkpoint: str = ""
    state: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0

    @classmethod
    def load(cls, final: Path) -> "Begun | None":
        """That of the stopped tuning to ``final``, if there is one. Raises InputError if it is damaged."""
        if not has_record(final, TUNING_STATE):
            return None
        content = read_record(partial_path(final) / TUNING_STATE / TUNING_RECORD, START_OVER)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise InputError(f"{final}: its unfinished work is no tuning's; start over with ‹overwrite›")
        try:
            if content.pop("format_version", None) != _FORMAT_VERSION:
                raise InputError("format_version")
            begun: Begun = typed(content, cls)
            begun._check()
        except InputError as error:
            raise InputError(
                f"{final}: was begun by another version of perta_fast, or its record is damaged ({error}); "
                "start over with ‹overwrite›"
            ) from error
        return begun

    def _check(self) -> None:
        """Raise InputError for what no tuning is begun with: whoever wrote the record, it is not believed."""
        self.request.check()
        parse_date(self.day)
        check_device(self.device)
        if self.dtype not in (None, *FLOATING):
            raise InputError(f"the model runs in {self.dtype!r}")
        if self.checkpoint != f"checkpoint-{len(self.losses)}":
            raise InputError(f"its checkpoint is {self.checkpoint!r}, of {len(self.losses)} steps")
        if len(self.divergences) != (0 if self.request.retain_kl is None else len(self.losses)):
            raise InputError(f"there are {len(self.divergences)} divergences of {len(self.losses)} steps")
        for number in (*self.losses, *self.divergences, self.seconds, self.loss_before or 0.0):
            if not math.isfinite(number):
                raise InputError(f"holds the number {number}")

    def check_request(self, final: Path, request: Request) -> None:
        """Raise InputError unless ``request`` is the same."""
        if self.request == request:
            return
        if not self.callbacks:
            raise InputError(unfinished_advice(final))
        raise InputError(
            f"{final}: another run to this place was stopped; finish it with the call of tune that began it, which has "
            "the callbacks, or start over with ‹overwrite›"
        )

    def check_callbacks(self, final: Path, callbacks: Sequence[str]) -> None:
        """Raise InputError unless ``callbacks`` are of the same types: no record can hold what they do."""
        if self.callbacks != list(callbacks):
            raise InputError(
                f"{final}: the tuning was begun with the callbacks {', '.join(self.callbacks) or '(none)'}, and needs "
                "them to go on: repeat the call of tune that began it, or start over with ‹overwrite›"
            )

    def check_inputs(self, final: Path, inputs: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Raise InputError if an input is no longer what it was, or another version would go on."""
        check_inputs(self.inputs, inputs, "tuning")
        check_versions(self.versions, versions, "tuning", final)

    def check_state(self, target: OutputDirectory) -> None:
        """Raise unless what is kept in ``target``, which is locked, is still this, byte for byte.

        InputError if it is damaged, RunError if another process has gone on with it meanwhile.
        """
        now = Begun.load(target.final)
        if now != self:
            target.keep = now is not None
            raise RunError(f"{target.final}: another run has gone on with this tuning meanwhile; see what is there now")
        folder = target.path / TUNING_STATE / self.checkpoint
        if self.state != _hashes(folder):
            raise InputError(f"{folder}: the kept state is damaged; start over with ‹overwrite›")


def _hashes(folder: Path) -> dict[str, str]:
    """By name, of the files in ``folder``; none if it is no directory."""
    return {path.name: hash_file(path) for path in sorted(folder.glob("*")) if path.is_file()}


def state_of_inputs(base: Checkpoint, sources: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """By path, what shows whether an input has changed: the base's files, and the rows."""
    return {**input_files(base), **{str(sources[role]): digest for role, digest in digests.items()}}


def clear_up(final: Path) -> None:
    """Finish a tuning whose result has got its name: what the trainer reported stays, its state goes."""
    state = final / TUNING_STATE
    check_own(state)
    remove_replaced(final)
    if (state / "runs").is_dir():
        os.replace(state / "runs", final / "runs")
    remove(state)


class KeptState:
    """Keeps the trainer's state in the hidden directory of an output, where a run that goes on finds it.

    A state is written when the last one is a minute old, and so seldom that this takes at most 5 % of the time: of an
    adapter it is small, of a whole checkpoint 12 bytes a parameter. It is left out if the disk would be full.
    """

    def __init__(self, target: OutputDirectory, begun: Begun, parameters: int, *, wanted: bool = True) -> None:
        """wanted: whether the inputs will be there when the run goes on."""
        self.directory = target.path / TUNING_STATE
        self.begun = begun
        self._target, self._wanted, self._size = target, wanted, _STATE_BYTES * parameters
        self._clock = self._began = time.monotonic()
        self._wait = _LEAST_WAIT

    @property
    def checkpoint(self) -> str | None:
        """The directory of the state to go on with."""
        return str(self.directory / self.begun.checkpoint) if self.begun.checkpoint else None

    def is_due(self) -> bool:
        """Whether it is time to keep a state."""
        if not self._wanted or time.monotonic() - self._clock < self._wait:
            return False
        try:
            self.directory.mkdir(exist_ok=True)
            if shutil.disk_usage(self.directory).free < 2 * self._size:
                self._keep_no_more("too little disk space")
        except OSError as error:
            self._keep_no_more(advice(error))
        self._clock = time.monotonic()
        return self._wanted

    def keep(self, name: str, save: Callable[[], None], losses: Iterable[float], divergences: Iterable[float]) -> None:
        """Keep the state that ``save`` writes into the directory ``name``: from here on the run goes on with that.

        If the disk fails, the training goes on without, and the state before this one stays.
        """
        folder = self.directory / name
        try:
            with disk_errors():
                save()
            sync_tree(folder)
            sync(self.directory)
            state = _hashes(folder)
        except OSError as error:
            remove(folder)
            self._keep_no_more(advice(error))
            return
        now = time.monotonic()
        begun = replace(
            self.begun,
            checkpoint=name,
            state=state,
            losses=list(losses),
            divergences=list(divergences),
            seconds=self.begun.seconds + now - self._began,
        )
        content = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(begun)}
        try:
            write_record(self.directory / TUNING_RECORD, content)
        except OSError as error:  # both states stay: the record may name either
            self._keep_no_more(advice(error))
            return
        self.begun, self._began, self._target.keep = begun, now, True
        for path in self.directory.glob("checkpoint-*"):
            if path.name != name:
                remove(path)
        cost, self._clock = time.monotonic() - self._clock, time.monotonic()
        self._wait = max(_LEAST_WAIT, cost / _LARGEST_SHARE)

    def _keep_no_more(self, reason: str) -> None:
        """Go on with the training alone."""
        LOGGER.warning("%s: the state of the training is no longer kept: %s", self._target.final, reason)
        self._wanted = False

    @property
    def is_kept(self) -> bool:
        """Whether a state is kept, or even the result."""
        return self._target.keep or self._is_named

    @property
    def _is_named(self) -> bool:
        """Whether the result is complete and has its name."""
        return not exists(self._target.path)

    def give_up(self) -> None:
        """Keep nothing: another attempt would end as this one."""
        self._target.keep = False

    def going_on(self) -> str:
        """How to go on after a stop."""
        final = self._target.final
        resuming = shell_command("perta", "resume", final)
        if self._is_named:
            left = f"; remove what is left of its state with: {resuming}" if exists(final / TUNING_STATE) else ""
            return f"the result is complete, in {final}{left}"
        if not self._target.keep:
            return "nothing was left behind"
        if self.begun.callbacks:
            call = "the same call of tune" + ", without ‹overwrite›" * self.begun.overwrite
            return f"what was learnt is kept; go on with {call}, which has the callbacks"
        return f"what was learnt is kept; go on with: {resuming}"

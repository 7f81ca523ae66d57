"""Finished parts of the work for one output file, kept beside it: a run that was stopped goes on with them."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta_fast.errors import InputError, RunError, advice, shell_command
from perta_fast.files.durable import read_record, remove, write_file, write_record
from perta_fast.files.new_directory import (
    EVALUATION_RECORD,
    EVALUATION_STATE,
    RESULT,
    START_OVER,
    beginning,
    forget,
    has_record,
    partial_path,
    take,
)
from perta_fast.files.own import remove_own_file
from perta_fast.files.reading import exists


def kept_record(final: Path) -> Any:
    """What the stopped run to ``final`` was begun with; None if there is none. Raises InputError if it is damaged."""
    if not has_record(final, EVALUATION_STATE):
        return None
    return read_record(partial_path(final) / EVALUATION_STATE / EVALUATION_RECORD, START_OVER)


class KeptParts:
    """The parts of the run to the file ``final``, by name; and the file itself at the end.

    A context manager. With the first part, ``record`` is written, which says what the run is. Parts stay if the run is
    stopped, unless bad input has stopped one that was not resumed; ``finish`` removes them. resume: go on with the
    parts that are there; else they are given up. again: what goes on; None is ``perta resume``.
    kind: what the parts depend on beside their names; those of another kind are not read.
    """

    kind = ""

    def __init__(self, final: Path, record: Mapping[str, Any], *, resume: bool, again: str | None = None) -> None:
        self._final, self._record = final, record
        self._again = again or shell_command("perta", "resume", final)
        self._folder = partial_path(final)
        self._state = self._folder / EVALUATION_STATE
        self._resume = self.any = resume
        self._locked = ExitStack()

    def __enter__(self) -> "KeptParts":
        with beginning(self._final, self._locked):
            if self._folder.is_file():  # a result that could not be given its name
                remove_own_file(self._folder)
            take(self._folder, self._locked, resume=self._resume)
        return self

    def read(self, name: str) -> Any:
        """A part; None if it was not finished. Raises InputError if it is damaged."""
        path = self._path(name)
        return read_record(path, START_OVER) if self.any and exists(path) else None

    def write(self, name: str, content: Any) -> None:
        """Keep a part, as JSON. Raises RunError if that fails."""
        try:
            self._begin()
            write_record(self._path(name), content)
        except OSError as error:
            raise self._lost(error) from error

    def folder(self, name: str) -> Path:
        """A directory where the work on a part keeps how far it has come; it is made if it is not there.

        From here on the run can be resumed. Raises RunError if that fails.
        """
        folder = self._path(name).with_suffix("")
        try:
            self._begin()
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._lost(error) from error
        return folder

    def finish(self, content: bytes) -> None:
        """Write the file, replacing one of its name, and remove the parts. Raises RunError if that fails."""
        try:
            write_file(self._final, content, self._folder / RESULT)
        except OSError as error:
            raise RunError(f"{self._final}: cannot be written: {error.strerror}; {self.going_on()}") from error
        self.any = False

    def going_on(self) -> str:
        """How to go on."""
        if not self.any:
            return "nothing was left behind"
        return f"what was done is kept; go on with: {self._again}"

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self.any or (isinstance(error, InputError) and not self._resume):
            forget(self._folder)
            remove(self._folder)
        self._locked.close()

    def _begin(self) -> None:
        """Write the record, if it is not there."""
        if not self.any:
            self._state.mkdir(exist_ok=True)
            write_record(self._state / EVALUATION_RECORD, self._record)
            self.any = True

    def _lost(self, error: OSError) -> RunError:
        return RunError(f"{self._final}: could not be written: {advice(error)}; {self.going_on()}")

    def _path(self, name: str) -> Path:
        return self._state / f"{blake3((self.kind + name).encode()).hexdigest()[:32]}.json"

"""The importances of a streamed run, if they are to be kept: written beside the subtraction, part by part."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch import Tensor

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.durable import sync_tree
from perta_fast.files.new_directory import OutputDirectory, partial_path, remove_replaced
from perta_fast.importance.store import STEM, ShardWriter

_WHAT = "the importances that are kept"


class KeptImportance:
    """A directory with one importance for each data set, which appears when ``commit`` is called.

    save: the directory, or "" to keep none. metadata: of each importance, by data set. resumed: go on with what
    an earlier attempt wrote. ranks: each writes its part of every tensor; the first one makes the directory and
    renames it at the end. After an error, what was written stays if ``keep_on_error`` was called.
    """

    def __init__(
        self,
        save: str,
        overwrite: bool,
        metadata: Mapping[str, Mapping[str, str]],
        shapes: Mapping[str, tuple[int, ...]],
        resumed: bool,
        ranks: Ranks,
    ) -> None:
        self._final = Path(save) if save else None
        self._overwrite, self._resumed, self._ranks = overwrite, resumed, ranks
        self._metadata, self._shapes = metadata, shapes
        self._writers: dict[str, ShardWriter] = {}
        self._output: OutputDirectory | None = None

    def __enter__(self) -> "KeptImportance":
        with ExitStack() as opened:
            with self._ranks.together(_WHAT):
                self._output = self._unfinished()
                if self._output is not None and self._ranks.first:
                    opened.enter_context(self._output)
            self._opened = opened.pop_all()
        return self

    def _unfinished(self) -> OutputDirectory | None:
        """The directory, unless there is nothing to write any more."""
        final = self._final
        if final is None:
            return None
        if self._resumed and final.is_dir() and not partial_path(final).exists():
            remove_replaced(final)
            return None
        output = OutputDirectory(final, overwrite=self._overwrite, resume=self._resumed)
        if self._resumed and not output.path.is_dir():
            raise InputError(f"{output.path}: is gone, with importances that the run has written")
        return output

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def keep_on_error(self) -> None:
        """From now on the run can be resumed."""
        if self._output is not None:
            self._output.keep = True

    def write(self, by_role: Mapping[str, Mapping[str, Tensor]], one_by_one: Mapping[str, str]) -> None:
        """Write this rank's part of complete means, by the names of stored tensors, durably."""
        if self._output is None:
            return
        for role, means in by_role.items():
            if role not in self._writers:
                folder = self._output.path / role
                folder.mkdir(exist_ok=True)
                metadata = {**self._metadata[role], "one_by_one": one_by_one[role]}
                self._writers[role] = ShardWriter(self._shapes, metadata, folder)
            for name, mean in means.items():
                self._writers[role].write_share(name, mean, self._ranks)
        sync_tree(self._output.path)

    def commit(self) -> dict[str, Checkpoint]:
        """Rename the directory; return its checkpoints by the names that they have as inputs."""
        final = self._final
        if final is None:
            return {}
        with self._ranks.together(_WHAT):
            if self._output is not None and self._ranks.first:
                self._output.commit()
        return {f"{role}_importance": Checkpoint.open(final / role, STEM) for role in self._metadata}

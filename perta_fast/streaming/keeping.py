"""The importances of a streamed run, where they are asked for: written beside the subtraction, part by part."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from perta_fast.checkpoint import Checkpoint
from perta_fast.durable import sync_tree
from perta_fast.errors import InputError
from perta_fast.importance.store import STEM, ShardWriter
from perta_fast.output import OutputDirectory, partial_path


class Keeping:
    """A directory with one importance for each data set, which appears when ``commit`` is called.

    save: the directory, or "" to keep none. metadata: of each importance, by data set. begun: go on with what
    an earlier attempt wrote. Left by an error, what was written stays if ``stay`` was set.
    """

    def __init__(
        self,
        save: str,
        overwrite: bool,
        metadata: Mapping[str, Mapping[str, str]],
        shapes: Mapping[str, tuple[int, ...]],
        begun: bool,
    ) -> None:
        self._final = Path(save) if save else None
        self._metadata, self._shapes = metadata, shapes
        self._writers: dict[str, ShardWriter] = {}
        self._output: OutputDirectory | None = None
        if self._final is not None and not (begun and self._committed(self._final)):
            self._output = OutputDirectory(self._final, overwrite=overwrite, resume=begun)
            if begun and not self._output.path.is_dir():
                raise InputError(f"{self._output.path}: is gone, with importances that the run has written")

    @staticmethod
    def _committed(final: Path) -> bool:
        return final.is_dir() and not partial_path(final).exists()

    def __enter__(self) -> "Keeping":
        if self._output is not None:
            self._output.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._output is not None:
            self._output.__exit__(kind, error, traceback)

    def stay(self) -> None:
        """From now on the run can be taken up again."""
        if self._output is not None:
            self._output.keep = True

    def write(self, by_role: Mapping[str, Mapping[str, Tensor]], one_by_one: Mapping[str, str]) -> None:
        """Write complete means by the names of stored tensors, durably."""
        if self._output is None:
            return
        for role, means in by_role.items():
            if role not in self._writers:
                folder = self._output.path / role
                folder.mkdir(exist_ok=True)
                metadata = {**self._metadata[role], "one_by_one": one_by_one[role]}
                self._writers[role] = ShardWriter(self._shapes, metadata, folder)
            for name, mean in means.items():
                self._writers[role].write(name, mean)
        sync_tree(self._output.path)

    def commit(self) -> dict[str, Checkpoint]:
        """Put the directory in its place; return its checkpoints by the names that they have as inputs."""
        if self._final is None:
            return {}
        if self._output is not None:
            self._output.commit()
        return {f"{role}_importance": Checkpoint.open(self._final / role, STEM) for role in self._metadata}

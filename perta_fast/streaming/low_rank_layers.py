"""The task vector of a LoRA adapter, changed with one decoder layer in memory at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perta_fast.files.new_directory import START_OVER
from perta_fast.preconditioning.unfinished import Begun, DamagedWalk
from perta_fast.preconditioning.vectors import Change, LowRankVector, Norms
from perta_fast.streaming.scratch_files import ScratchFiles


class LowRankLayers:
    """A ``LowRankVector`` whose changed A's are in scratch files, too, at the end of each layer.

    Memory: all A's, in float32.
    """

    def __init__(self, vector: LowRankVector) -> None:
        self._vector = vector
        self._kept = 0  # of the changed A's
        self._files = {update.a.name: f"a-{number}" for number, update in enumerate(vector.updates.values())}
        self.shards: list[str] = []  # it writes none before its end

    @property
    def norms(self) -> Norms:
        """Those of the vector."""
        return self._vector.norms

    @norms.setter
    def norms(self, norms: Norms) -> None:
        self._vector.norms = norms

    @property
    def names(self) -> Sequence[str]:
        """Of the maps, in the order of the model."""
        return self._vector.names

    def change(self, name: str, change: Change) -> None:
        """Change the A of one map."""
        self._vector.change(name, change)

    def write(self, directory: Path) -> None:
        """Write the adapter."""
        self._vector.write(directory)

    def end_layer(self, scratch: ScratchFiles) -> None:
        """Keep the A's of a layer whose maps are changed."""
        for name in list(self._vector.changed)[self._kept :]:
            scratch.put(self._files[name], self._vector.changed[name])
        self._kept = len(self._vector.changed)

    def restore(self, begun: Begun, maps: Sequence[str], scratch: ScratchFiles, advance: Callable[[int], Any]) -> None:
        """Go on after the layers of ``maps``. Raises DamagedWalk if one of their A's is not there."""
        for name in maps:
            a = self._vector.updates[name].a
            record = begun.files.get(self._files[a.name])
            if record is None or (record["dtype"], record["shape"]) != ("float32", list(a.shape)):
                raise DamagedWalk(f"{a.path}: what the run made of tensor {a.name} is not there; {START_OVER}")
            self._vector.changed[a.name] = scratch.get(self._files[a.name])
        self._kept = len(self._vector.changed)

    def written(self, begun: Begun) -> list[Path]:
        """The files that ``restore`` reads, but for those of scratch."""
        return []

"""The walk that preconditions a task vector layer by layer; one that was stopped goes on at the layer it had come to.

After each layer, what was made of it and the hidden states that the next one gets are flushed; then a record that names
them is written; then the files that no later layer needs are removed. So, whatever stops the walk, the record on the
disk names files that are there.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from perta_fast.data.samples import Sample
from perta_fast.errors import InputError
from perta_fast.files.durable import remove, sync
from perta_fast.files.new_directory import PRECONDITIONING_STATE, START_OVER, OutputDirectory
from perta_fast.preconditioning.input_moments import PHASE
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.preconditioning.unfinished import Begun, DamagedWalk, Work
from perta_fast.preconditioning.vectors import Norms, TaskVector
from perta_fast.progress import Bar, Progress
from perta_fast.records.typed_json import fits
from perta_fast.streaming.linear_inputs import layer_moments, layer_of_maps
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.scratch_files import FileRecord, ScratchFiles
from perta_fast.streaming.torch_threads import torch_threads


class LayeredVector(TaskVector, Protocol):
    """A task vector whose maps are changed in the order of the model. shards: as ``Begun`` has them."""

    shards: list[str]

    def end_layer(self, scratch: ScratchFiles) -> None:
        """Keep what was made of a layer, in files of its own, which are durable then, or in ``scratch``."""

    def restore(self, begun: Begun, maps: Sequence[str], scratch: ScratchFiles, advance: Callable[[int], Any]) -> None:
        """Go on after ``begun.done`` layers, which have these maps. Raises DamagedWalk."""

    def written(self, begun: Begun) -> list[Path]:
        """The files of its own that ``restore`` reads."""


@dataclass(frozen=True)
class KeptWalk:
    """Where a walk keeps how far it has come. folder: below the directory that is being built, for nothing else.

    begun: what a stopped walk has left there. overwrite: whether the run may replace what is at its place. unchanged:
    raises RunError if an input is not what it was when it was opened. recorded: called once there is a record.
    """

    folder: Path
    work: Work
    begun: Begun | None = None
    overwrite: bool = False
    unchanged: Callable[[], object] = lambda: None
    recorded: Callable[[], object] = lambda: None

    @classmethod
    def below(
        cls, target: OutputDirectory, work: Work, begun: Begun | None, overwrite: bool, unchanged: Callable[[], object]
    ) -> "KeptWalk":
        """In ``target``, which stays if the run is stopped once there is a record."""

        def recorded() -> None:
            target.keep = True

        return cls(target.path / PRECONDITIONING_STATE, work, begun, overwrite, unchanged, recorded)

    def keep(self, begun: Begun) -> None:
        """Write a record of what is durable already."""
        self.unchanged()  # what is recorded was made of the inputs as they were
        begun.save(self.folder)
        if begun.done == 1:
            for above in self.folder.parents[:2]:
                sync(above)
        self.recorded()


@dataclass(frozen=True)
class LayerWalk:
    """One walk. begun: what it goes on from, or begins with. directory: of θ_f."""

    skeleton: Skeleton
    maps: Mapping[str, nn.Module]
    samples: Sequence[Sample]
    mu: float
    kept: KeptWalk
    directory: Path
    progress: Progress

    def change(self, vector: LayeredVector, begun: Begun, clock: float) -> None:
        """Change all maps, layer by layer. clock: when this attempt began.

        Raises DamagedWalk if what a stopped walk has kept is damaged, NotFiniteError, RunError, OSError.
        """
        layers, count = len(self.skeleton.layers), len(self.samples)
        scratch = ScratchFiles(self.kept.folder / "scratch")
        if begun.done:
            self._restore(vector, begun, scratch)
        done = (1 + begun.done) * count if begun.done else 0
        with torch_threads(begun.torch_threads), Bar((layers + 1) * count, PHASE, self.progress, "step", done) as bar:
            start = begun.seconds
            for means in layer_moments(
                self.skeleton, self.maps, self.samples, begun.batch_size, scratch, bar.update, begun.done
            ):
                for name in list(means):
                    vector.change(name, partial(preconditioned, moment=means.pop(name), mu=self.mu))
                vector.end_layer(scratch)
                step = scratch.end_step()
                step.flush()
                sync(self.kept.folder / "scratch")
                begun = replace(
                    begun,
                    done=begun.done + 1,
                    files=dict(step.files),
                    shards=list(vector.shards),
                    before=vector.norms.before,
                    after=vector.norms.after,
                    seconds=start + time.perf_counter() - clock,
                )
                self.kept.keep(begun)
                step.remove_discarded()

    def _restore(self, vector: LayeredVector, begun: Begun, scratch: ScratchFiles) -> None:
        """Check and take what a stopped walk has kept; what it had not finished is removed."""
        if begun.done > len(self.skeleton.layers) or not fits(begun.files, dict[str, FileRecord]):
            raise DamagedWalk(f"{self.kept.folder}: is not the record of this walk; {START_OVER}")
        written = vector.written(begun)
        if begun.done < len(self.skeleton.layers) and f"hidden-{begun.done}" not in begun.files:
            raise DamagedWalk(f"{self.kept.folder}: has no hidden states to go on with; {START_OVER}")
        _keep_only([*written, self.kept.folder], self.directory)
        size = scratch.size + sum(path.stat().st_size for path in written if path.is_file())
        try:
            with Bar(size, "check what is kept", self.progress) as bar:
                scratch.restore(begun.files, bar.update)
                vector.restore(begun, list(self._maps_of(begun.done)), scratch, bar.update)
        except DamagedWalk:
            raise
        except InputError as error:
            raise DamagedWalk(f"{error}") from error
        vector.norms = Norms(begun.before, begun.after)

    def _maps_of(self, layers: int) -> Iterator[str]:
        """The names of the maps of the first layers."""
        for of_layer in layer_of_maps(self.skeleton, self.maps)[:layers]:
            yield from of_layer


def _keep_only(paths: Sequence[Path], directory: Path) -> None:
    for path in directory.iterdir():
        if path not in paths:
            remove(path)

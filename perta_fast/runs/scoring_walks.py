"""The walks of a streamed evaluation: where their hidden states lie, how they are cut, what they find."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.errors import RankLost, RunError, advice
from perta_fast.evaluation.kept_passes import kept_part
from perta_fast.evaluation.request import Request
from perta_fast.files.kept_parts import KeptParts
from perta_fast.memory import return_freed_blocks
from perta_fast.progress import Progress
from perta_fast.runs.settings import threads_for
from perta_fast.streaming.forecast.choice import schedule_for
from perta_fast.streaming.forecast.forward_costs import forward_estimate
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule


@dataclass(frozen=True)
class ScoringWalks:
    """Walks whose hidden states and finished scores lie in ``folder``.

    resumable: whether these stay after a stop. kept: what else does, of the first rank.
    """

    folder: Path
    resumable: bool
    request: Request
    progress: Progress
    ranks: Ranks
    kept: KeptParts | None

    def schedule(self, name: str, skeleton: Skeleton, sets: Sequence[SampleSet]) -> Schedule:
        """How a walk is cut; the first rank chooses, and keeps that for when the walk goes on.

        Raises InputError if memory or disk are too small.
        """
        schedule, request, threads = None, self.request, threads_for(None, self.ranks)

        def choose() -> dict[str, Any]:
            chosen = schedule_for(
                forward_estimate(skeleton, [Version(name)], sets, threads, self.ranks.world),
                request.batch_size,
                self.folder,
                request.memory,
                request.device_memory,
                skeleton.first_shard,
                self.progress is True,
                self.ranks.world,
            )
            return asdict(chosen)

        with self.ranks.together("the choice of a schedule"):
            if self.ranks.first:
                schedule = Schedule(**kept_part(self.kept, f"{name} schedule", self.ranks.world, choose))
        if request.memory is not None:
            return_freed_blocks()
        shared: Schedule = self.ranks.share(schedule)
        return shared

    def scores(self, name: str, skeleton: Skeleton, sets: Sequence[SampleSet], schedule: Schedule) -> VersionScores:
        """What a model scores. Raises RunError, with how to go on, if the disk is full."""
        threads = threads_for(None, self.ranks)
        with self.ranks.together(name), self._explaining():
            (found,) = score_versions(
                skeleton,
                [Version(name)],
                sets,
                schedule=schedule,
                threads=threads,
                folder=self.folder / name.replace(" ", "-"),
                resumable=self.resumable,
                progress=self.progress,
                description=f"scoring by the {name}",
                ranks=self.ranks,
            )
        return found

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say in an error of the walk how to go on."""
        rest = "nothing was left behind" if self.kept is None else self.kept.going_on()
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.folder}: could not be written: {advice(error)}; {rest}") from error
        except RunError as error:
            if isinstance(error, RankLost):
                raise
            raise RunError(f"{error}; {rest}") from error


@contextmanager
def scoring_walks(request: Request, progress: Progress, ranks: Ranks, kept: KeptParts | None) -> Iterator[ScoringWalks]:
    """With a directory beside the result; or where temporary files lie, which is removed at the end."""
    with ExitStack() as opened:
        folder = None
        with ranks.together("the scratch directory"):
            if kept is not None:
                folder = kept.folder("walks")
            elif ranks.first:
                folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="perta-eval-")))
        folder, resumable = ranks.share((folder, kept is not None))
        check_shared(folder, ranks)
        yield ScoringWalks(folder, resumable, request, progress, ranks, kept)

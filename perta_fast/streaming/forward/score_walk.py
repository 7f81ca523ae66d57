"""One forward walk that scores several versions of a model's weights."""

from collections.abc import Sequence
from pathlib import Path

from perta_fast.distributed.ranks import Ranks
from perta_fast.progress import Progress
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.model.skeleton import Skeleton


def score_versions(
    skeleton: Skeleton,
    versions: Sequence[Version],
    sets: Sequence[SampleSet],
    *,
    batch_size: int,
    threads: int,
    folder: Path,
    resumable: bool = False,
    progress: Progress = True,
    description: str = "scoring",
    ranks: Ranks = Ranks.ALONE,
) -> list[VersionScores]:
    """Run every version over every set, reading the inputs of each part of the model once for all versions.

    The numbers are those of ``score_rows`` on the loaded model, the same bits in float32 on the CPU. folder: for
    hidden states and finished scores; made here, and left for the caller to remove. resumable: keep a record there
    after each version of each part, from which a later call with the same arguments goes on. ranks: each runs its share
    of every set's batches; all get the whole result.

    Memory: the inputs of one part of the model, one changed copy of it, the activations of one batch. Raises RunError
    if the disk is full or a file has changed its size, InputError if the record is damaged or of other samples.
    """
    raise NotImplementedError

"""An importance written while it is computed, so that it is never in memory whole."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perta_fast.data import Sample
from perta_fast.durable import remove
from perta_fast.importance.gradients import check_finite
from perta_fast.importance.store import Importance, ImportanceMetadata, ShardWriter, as_strings
from perta_fast.output import OutputDirectory
from perta_fast.progress import sample_bar
from perta_fast.streaming.data_pass import DataPass, Means
from perta_fast.streaming.passage import Passage
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.skeleton import Skeleton
from perta_fast.streaming.walk import Walk, handlings


def write_importance(
    skeleton: Skeleton,
    samples: Sequence[Sample],
    metadata: ImportanceMetadata,
    schedule: Schedule,
    *,
    out: str | Path,
    overwrite: bool,
    description: str,
    progress: bool,
) -> Importance:
    """Walk through ``skeleton`` and write each part's means as soon as they are complete.

    metadata: of the importance, but for the parameters that take a pass for each sample. The scratch files lie
    in the hidden directory that becomes ``out``: an error or an interrupt removes both. Returns the importance
    as it lies on disk. Raises RunError if a loss or a mean is not finite, or the disk is full.
    """
    target = OutputDirectory(out, overwrite=overwrite)
    total = len(samples) * handlings(len(skeleton.layers), schedule)
    with target, sample_bar(total, description, progress) as bar:
        scratch = target.path / "scratch"
        passage = Passage(skeleton.model, skeleton.layers, str(skeleton.checkpoint.path))
        data = DataPass(skeleton, passage, samples, metadata.estimator, schedule, scratch, bar.update)
        writer: ShardWriter | None = None

        def settle(done: int, means: Sequence[Means]) -> None:
            nonlocal writer
            data.spill.settle().clear()
            for name, mean in skeleton.as_stored(means[0]).items():
                check_finite(name, mean)
                if writer is None:  # only now is it known which parameters take a pass for each sample
                    found = replace(metadata, one_by_one=", ".join(data.one_by_one))
                    writer = ShardWriter(skeleton.stored_shapes, as_strings(found), target.path)
                writer.write(name, mean)

        Walk(skeleton, passage, [data], schedule).run(settle)
        remove(scratch)
        target.commit()
    return Importance.load(target.final)

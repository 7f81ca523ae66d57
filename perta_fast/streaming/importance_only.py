"""An importance that is written while it is computed, and is never whole in memory."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.data.samples import Sample
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.files.durable import remove, sync_tree
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.importance.gradients import check_finite
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import Importance, ImportanceMetadata, ShardWriter, as_strings, stored_name
from perta_fast.progress import Bar, Progress
from perta_fast.streaming.data_pass import DataPass, Means, share_of, sum_over_ranks_
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.walk import Walk, steps_per_sample


def write_importance(
    skeleton: Skeleton,
    samples: Sequence[Sample],
    metadata: ImportanceMetadata,
    schedule: Schedule,
    *,
    out: str | Path,
    overwrite: bool,
    description: str,
    stored: str,
    progress: Progress,
    ranks: Ranks,
) -> Importance:
    """Walk through ``skeleton``, write each part's means as soon as they are complete, and return the whole from disk.

    metadata: of the importance; ``one_by_one`` is filled in here. stored: its type, float32 or bfloat16. ranks: each
    runs its share of the samples, and writes its share of every tensor. The scratch files lie in the hidden directory
    that becomes ``out``; an error or an interrupt removes both. Raises RunError if a loss or a mean is not finite, the
    disk is full, or a weight file has changed meanwhile.
    """
    target = OutputDirectory(out, overwrite=overwrite)
    share = share_of(samples, ranks)
    total = len(share) * steps_per_sample(len(skeleton.layers), schedule)
    with ExitStack() as opened, Bar(total, description, ranks.first and progress, "step") as bar:
        with ranks.together("the output directory"):
            if ranks.first:
                opened.enter_context(target)
        check_shared(target.path, ranks)
        scratch = target.path / f"scratch-{ranks.rank}"
        writer: ShardWriter | None = None

        def end_step(done: int, means: Sequence[Means]) -> None:
            nonlocal writer
            data.scratch.end_step().remove_discarded()
            with ranks.together(description):
                pass  # until all have run the step; if one could not, all end
            sum_over_ranks_(means, ranks)
            for name, mean in skeleton.as_stored(means[0]).items():
                check_finite(name, mean)
                if writer is None:  # after the forward steps, which find the parameters for ``one_by_one``
                    complete = replace(metadata, one_by_one=", ".join(data.one_by_one))
                    rows = RowDigests.of(samples) if metadata.rows_hash else None
                    shapes, table = skeleton.stored_shapes, as_strings(complete)
                    writer = ShardWriter(shapes, table, target.path, stored_name(stored), rows=rows)
                writer.write_share(name, mean, ranks)

        with ranks.sharing_errors(description):
            data = DataPass(skeleton, samples, share, metadata.estimator, schedule, scratch, bar.update)
            Walk(skeleton, [data], schedule).run(end_step)
            with ranks.together(description):
                remove(scratch)
        with ranks.together(description):  # now that no rank removes files that another one flushes
            sync_tree(target.path)
        with ranks.together(description):
            check_as_opened([skeleton.checkpoint])
            if ranks.first:
                target.commit()
    return Importance.load(target.final)

"""An importance written while it is computed, so that it is never in memory whole."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from perta_fast.data.samples import Sample
from perta_fast.distributed.dealing import stretch
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.shared_directory import check_shared
from perta_fast.files.durable import remove, sync_tree
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.importance.gradients import check_finite
from perta_fast.importance.store import Importance, ImportanceMetadata, ShardWriter, as_strings
from perta_fast.progress import Progress, step_bar
from perta_fast.streaming.data_pass import DataPass, Means, add_up_, shares_of
from perta_fast.streaming.model.passage import Passage
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
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
    progress: Progress,
    ranks: Ranks,
) -> Importance:
    """Walk through ``skeleton`` and write each part's means as soon as they are complete.

    metadata: of the importance, but for the parameters that take a pass for each sample. ranks: each runs its
    share of the samples, and writes its part of every tensor. The scratch files lie in the hidden directory
    that becomes ``out``: an error or an interrupt removes both. Returns the importance as it lies on disk.
    Raises RunError if a loss or a mean is not finite, or the disk is full.
    """
    target = OutputDirectory(out, overwrite=overwrite)
    share = shares_of(samples, ranks.world)[ranks.rank]
    total = len(share) * handlings(len(skeleton.layers), schedule)
    with ExitStack() as opened, step_bar(total, description, ranks.first and progress) as bar:
        with ranks.together("the output directory"):
            if ranks.first:
                opened.enter_context(target)
        check_shared(target.path, ranks)
        scratch = target.path / f"scratch-{ranks.rank}"
        passage = Passage(skeleton.model, skeleton.layers, str(skeleton.checkpoint.path))
        writer: ShardWriter | None = None

        def settle(done: int, means: Sequence[Means]) -> None:
            nonlocal writer
            data.spill.settle().clear()
            with ranks.together(description):
                pass  # all have run the step, or one says why not
            add_up_(means, ranks)
            for name, mean in skeleton.as_stored(means[0]).items():
                check_finite(name, mean)
                if writer is None:  # only now is it known which parameters take a pass for each sample
                    found = replace(metadata, one_by_one=", ".join(data.one_by_one))
                    writer = ShardWriter(skeleton.stored_shapes, as_strings(found), target.path)
                part = stretch(mean.numel(), ranks.rank, ranks.world)
                writer.write(name, mean.view(-1)[part], part.start)

        with ranks.telling(description):
            data = DataPass(
                skeleton, passage, samples, share, metadata.estimator, schedule, scratch, bar.update
            )
            Walk(skeleton, passage, [data], schedule).run(settle)
            with ranks.together(description):
                remove(scratch)
        with ranks.together(description):  # as files that another removes cannot be flushed
            sync_tree(target.path)
        with ranks.together(description):
            if ranks.first:
                target.commit()
    return Importance.load(target.final)

"""An importance written while it is computed, so that it is never in memory whole."""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

from perta_fast.data import Sample
from perta_fast.durable import remove
from perta_fast.importance.gradients import check_finite
from perta_fast.importance.store import Importance, ImportanceMetadata, ShardWriter, as_strings
from perta_fast.output import OutputDirectory, check_space
from perta_fast.progress import sample_bar
from perta_fast.rules import Estimator
from perta_fast.streaming.skeleton import Skeleton
from perta_fast.streaming.walk import Means, Walk, steps


def write_importance(
    skeleton: Skeleton,
    samples: Sequence[Sample],
    estimator: Estimator,
    describe: Callable[[Sequence[str]], ImportanceMetadata],
    *,
    batch_size: int,
    out: str | Path,
    overwrite: bool,
    description: str,
    progress: bool,
) -> Importance:
    """Walk through ``skeleton`` and write each layer's means as soon as they are complete.

    describe: makes the metadata from the names of parameters that took a backward pass for each sample. The
    scratch files lie in the hidden directory that becomes ``out``: an error or an interrupt removes both.
    Returns the importance as it lies on disk. Raises RunError if a loss or a mean is not finite, or the disk is
    full.
    """
    target = OutputDirectory(out, overwrite=overwrite)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.model.named_parameters()}
    total = len(samples) * steps(len(skeleton.layers))
    with target, sample_bar(total, description, progress) as bar:
        scratch = target.path / "scratch"
        scratch.mkdir()
        walk = Walk(skeleton, samples, estimator, batch_size, scratch, bar.update)
        check_space(target.final, 4 * sum(map(prod, shapes.values())) + walk.scratch_bytes)
        walk.forward()
        layout = {stored: shapes[name] for name, stored in skeleton.stored.items()}
        metadata = describe(walk.one_by_one)
        writer = ShardWriter(layout, as_strings(metadata), target.path)

        def write(means: Means) -> None:
            for name, mean in means.items():
                check_finite(skeleton.stored[name], mean)
                writer.write(skeleton.stored[name], mean)

        walk.backward(write)
        remove(scratch)
        target.commit()
    return Importance.load(target.final)

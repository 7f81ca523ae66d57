"""A walk's samples dealt over ranks, and what each adds to the means."""

from collections.abc import Sequence

from perta_fast.data.samples import Sample
from perta_fast.distributed.dealing import deal
from perta_fast.distributed.ranks import Ranks
from perta_fast.streaming.data_pass import Means


def shares_of(samples: Sequence[Sample], ranks: int) -> list[list[int]]:
    """The numbers of the samples that each of so many ranks runs."""
    return deal([len(each.input_ids) for each in samples], ranks)


def add_up_(means: Sequence[Means], ranks: Ranks) -> None:
    """Add up over ``ranks``, in place, what each has for each data set: the means over all samples."""
    pending = [ranks.sum_async_(mean) for each in means for mean in each.values()]
    for each in pending:
        each.wait()

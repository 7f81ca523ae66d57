"""Whether a task vector is zero, so that a run would change nothing; asked before the work begins. No torch."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.safetensors_file import TensorEntry, read_values
from perta_fast.errors import InputError
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

_SAMPLE = 1 << 14  # elements that are looked at first, at both ends of a tensor: tuning changes nearly all
_CHUNK = 1 << 20

Pair = tuple[TensorEntry, TensorEntry]  # the values of tuned and base for one tensor


@dataclass(frozen=True)
class TaskVectorCounts:
    """How many tensors a task vector changes, and how many it does not. aside: those not compared, by the reason."""

    differ: int
    same: int
    aside: dict[str, int]


def count_changes(sources: Sources, advance: Callable[[int], object]) -> TaskVectorCounts:
    """Look at every tensor of opened inputs. advance: called with the bytes of each tensor of the model.

    Reads are few for a tensor that differs, and both tensors for one that does not. Raises RunError if a file cannot be
    read.
    """
    differ, same, aside = 0, 0, Counter[str]()
    for match in sources.matches:
        if match.copied is not None and match.copied != "task vector is zero":
            aside[match.copied] += 1
        elif _is_changed(sources, match):
            differ += 1
        else:
            same += 1
        advance(match.theta.size)
    return TaskVectorCounts(differ, same, dict(aside))


def _is_changed(sources: Sources, match: TensorMatch) -> bool:
    if match.low_rank is not None:
        return adds(match.low_rank)
    if match.tuned is not None and match.base is not None:
        return is_nonzero([(match.tuned, match.base)])
    return _is_changed_by_peft(sources, match)


def check_task_vector(sources: Sources, advice: str = "") -> None:
    """Raise InputError, with the cause and ``advice``, if the run would subtract nothing from any tensor."""
    matches = [match for match in sources.matches if match.copied is None]
    pairs = [(match.tuned, match.base) for match in matches if match.tuned is not None and match.base is not None]
    updates = [match.low_rank for match in matches if match.low_rank is not None]
    if is_nonzero(pairs, updates) or any(_is_changed_by_peft(sources, match) for match in matches):
        return
    reasons = {match.copied for match in sources.matches}
    where = " in all tensors that the importances cover" if "not covered by the importance" in reasons else ""
    if "left alone by choice" in reasons:
        where = " in all tensors that ‹only› and ‹leave› let the run change"
    if None in reasons or sources.adapter_config is not None:
        raise InputError(f"{sources.tuned.path}: nothing would change{_cause(sources, where)}{advice}")
    raise InputError(f"{sources.model.path}: nothing would change: {_all_copied(sources)}{advice}")


def _is_changed_by_peft(sources: Sources, match: TensorMatch) -> bool:
    if match.merged is None or match.base is None or sources.adapter is None:
        return False
    return sources.adapter.adds_to(match.merged, read_values(match.base, 0, match.common))


def _cause(sources: Sources, where: str) -> str:
    if sources.adapter_config is not None and any(match.copied == "left alone by choice" for match in sources.matches):
        return f"{where}, as the adapter does not; let it change others, or give an adapter that was trained on these"
    if sources.adapter_config is not None:
        return f"{where}: {zero_because(sources)}; give an adapter that was trained"
    if sources.tuned.path.samefile(sources.base.path):
        where = ""
    return (
        f": {zero_because(sources)}{where}, so the task vector is zero; for tuned, give the checkpoint that was tuned "
        "on the forget data"
    )


def zero_because(sources: Sources) -> str:
    """Why a task vector that is zero is zero, in a few words."""
    tuned, base = sources.tuned.path, sources.base.path
    if sources.adapter_config is None:
        return "it is the same checkpoint as base" if tuned.samefile(base) else f"it has the same values as {base}"
    made = any(match.merged is not None for match in sources.matches)
    return f"{'what it adds is zero but for rounding' if made else 'factors A or B are all zero'}, as before training"


def _all_copied(sources: Sources) -> str:
    reasons = dict.fromkeys(str(match.copied) for match in sources.matches)
    return f"of every tensor, {' or '.join(reasons)}" if reasons else "it holds no tensor"


def is_nonzero(pairs: Iterable[Pair], updates: Iterable[LowRank] = ()) -> bool:
    """Whether some element of a task vector is not zero, at the first one that shows it.

    pairs: floating-point tensors; beyond the end of the shorter one nothing is compared. updates: of low rank; factors
    whose product vanishes though neither is zero count as not zero. Raises RunError if a file cannot be read.
    """
    if any(map(adds, updates)):
        return True
    apart = [(tuned, base) for tuned, base in pairs if _place(tuned) != _place(base)]
    return any(_differ(*pair, *ends) for pair in apart for ends in _samples(*pair)) or any(
        _differ(*pair, begin, min(begin + _CHUNK, _common(*pair)))
        for pair in apart
        for begin in range(0, _common(*pair), _CHUNK)
    )


def adds(update: LowRank) -> bool:
    """Whether an update of low rank changes anything: its scale and both factors are not zero."""
    return update.scale != 0 and all(bool(factor.any()) for factor in update.factors())


def _place(entry: TensorEntry) -> list[tuple[int, ...]]:
    """Where the bytes lie, whatever the name of the file."""
    stored = entry.pieces or (entry,)
    return [(status.st_dev, status.st_ino, piece.begin) for piece in stored if (status := piece.path.stat())]


def _common(tuned: TensorEntry, base: TensorEntry) -> int:
    return min(tuned.count, base.count)


def _samples(tuned: TensorEntry, base: TensorEntry) -> Iterator[tuple[int, int]]:
    count = _common(tuned, base)
    yield 0, min(_SAMPLE, count)
    yield max(0, count - _SAMPLE), count


def _differ(tuned: TensorEntry, base: TensorEntry, begin: int, end: int) -> bool:
    first, second = (read_values(entry, begin, end) for entry in (tuned, base))
    return bool((first != second).any())

"""How ranks meet: values, sums, errors, and a rank that dies."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from perta_fast.distributed.ranks import Ranks, deal, is_shared
from perta_fast.errors import InputError, NotFiniteError, RankLost, RunError, advice
from tests.distributed.launch import on_ranks


def _caught(work: Callable[[], Any]) -> tuple[type[BaseException], str, bool] | None:
    try:
        work()
    except BaseException as error:
        return type(error), str(error), is_shared(error)
    return None


def _meet(group: Any) -> dict[str, Any]:
    ranks = Ranks.of(group)
    found: dict[str, Any] = {"gathered": ranks.gather({"rank": ranks.rank}), "shared": ranks.share(ranks.rank + 7)}
    tensor = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
    ranks.sum_async_(tensor).wait()
    found["sum"] = tensor.tolist()
    parts = [torch.full((3,), k + 0.5) for k in range(4)]
    for each in [ranks.sum_async_(part) for part in parts]:
        each.wait()
    found["sums"] = [each.tolist() for each in parts]

    def failing(rank: int, error: BaseException) -> None:
        with ranks.together("the test"):
            if ranks.rank == rank:
                raise error

    for name, rank, error in (
        ("input", 1, InputError("no such file")),
        ("finite", 0, NotFiniteError("NaN")),
        ("system", 1, OSError(28, "no space")),
        ("fault", 0, KeyError("k")),
    ):
        found[name] = _caught(lambda rank=rank, error=error: failing(rank, error))
    found["none"] = _caught(lambda: failing(99, InputError("nobody's")))
    return found


def test_ranks_meet() -> None:
    first, second = on_ranks(2, _meet)
    for found in (first, second):
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert found["shared"] == 7
        assert found["sum"] == [3.0, 30.0]
        assert found["sums"] == [[2 * k + 1.0] * 3 for k in range(4)]
        assert found["none"] is None
    assert second["input"] == (InputError, "no such file", True)
    assert first["input"] == (InputError, "rank 1: no such file", True)
    assert first["finite"] == (NotFiniteError, "NaN", True)
    assert second["finite"] == (NotFiniteError, "rank 0: NaN", True)
    assert second["system"] == (OSError, "[Errno 28] no space", True)
    assert first["system"] == (RunError, f"rank 1: {advice(OSError(28, ''))}", True)
    assert second["fault"] == (RunError, "rank 0: KeyError: 'k'", True)


def _lose_one(group: Any) -> Any:
    ranks = Ranks.of(group)
    with ranks.together("the sums"):
        if ranks.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.sum_async_(torch.ones(5)).wait()


def test_a_rank_that_is_killed_is_missed_by_all_others() -> None:
    outcomes = on_ranks(3, _lose_one)
    assert outcomes[2] is None
    for error in outcomes[:2]:
        assert isinstance(error, RankLost)
        assert str(error).startswith("the sums: another process of this run died")


def _leave(group: Any) -> Any:
    with Ranks.of(group).together("the wait"):
        if dist.get_rank(group) == 0:
            raise KeyboardInterrupt


def test_an_interrupt_does_not_wait_for_the_others() -> None:
    interrupted, left = on_ranks(2, _leave)
    assert isinstance(interrupted, KeyboardInterrupt)
    assert isinstance(left, RankLost)


def test_one_process_alone_needs_no_group() -> None:
    ranks = Ranks.of(None)
    assert ranks is Ranks.ALONE
    assert ranks.first
    assert ranks.gather("x") == ["x"]
    assert ranks.share("x") == "x"
    tensor = torch.ones(2)
    ranks.sum_async_(tensor).wait()
    assert tensor.tolist() == [1, 1]
    with pytest.raises(KeyError), ranks.together("nothing"):
        raise KeyError
    assert not dist.is_initialized()


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 6))
def test_all_is_dealt_and_evenly(costs: list[int], hands: int) -> None:
    dealt = deal(costs, hands)
    assert sorted(piece for hand in dealt for piece in hand) == list(range(len(costs)))
    sums = [sum(costs[piece] for piece in hand) for hand in dealt]
    # By its last piece a hand was no fuller than any other.
    assert max(sums) - min(sums) <= max(costs, default=0)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1 or len(set(costs)) > 1

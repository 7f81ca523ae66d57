"""Importance with the samples dealt over ranks: against autograd in float64, and against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import Importance, InputError, estimate_importance
from perta_fast.data.samples import Sample
from perta_fast.distributed import overlapped_sum
from perta_fast.distributed.overlapped_sum import OverlappedSum
from perta_fast.distributed.ranks import Pending, Ranks
from perta_fast.errors import NotFiniteError, RankLost
from tests.distributed.launch import on_ranks
from tests.runs.test_estimate import SAMPLES, assert_near, by_autograd, make, saved

Tensors = dict[str, torch.Tensor]
ESTIMATORS: tuple[Any, ...] = ("grad", "empirical-fisher")


def _found(group: Any, work: list[tuple[str, int]], folder: Path) -> dict[Any, Tensors]:
    """Every family with its number of samples, by both estimators; one of them saved to ``folder``."""
    overlapped_sum._SMALL = 4096  # so that these models have large tensors too
    found = {}
    for family, count in work:
        for estimator in ESTIMATORS:
            out = folder / family / estimator
            importance = estimate_importance(
                make(family), SAMPLES[:count], estimator, batch_size=2, progress=False, out=out, group=group
            )
            found[family, count, estimator] = dict(importance.tensors)
    return found


@pytest.mark.parametrize(
    ("world", "work"),
    [
        (2, [(family, 11) for family in ("llama", "llama tied", "gpt2", "mixtral")]),
        (4, [("llama tied", 3), ("mixtral", 7)]),  # a rank without samples; experts that few ranks reach
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_samples_dealt_over_ranks(world: int, work: list[tuple[str, int]], tmp_path: Path) -> None:
    outcomes = on_ranks(world, _found, work, tmp_path)
    for family, count in work:
        model = make(family)
        for estimator, values in zip(ESTIMATORS, by_autograd(model, SAMPLES[:count]), strict=True):
            expected = saved(model, values, tmp_path / "expected" / family / estimator)
            one = estimate_importance(model, SAMPLES[:count], estimator, progress=False).tensors
            found = outcomes[0][family, count, estimator]
            assert_near(found, expected)
            assert_near(found, one, 1e-6)
            for other in outcomes[1:]:
                assert all(torch.equal(other[family, count, estimator][name], found[name]) for name in found)
            kept = Importance.load(tmp_path / family / estimator)
            assert all(torch.equal(kept.tensors[name], found[name]) for name in found)
            assert kept.metadata.sample_count == count


def _refused(group: Any) -> list[BaseException | None]:
    ranks = Ranks.of(group)

    def error(data: Any, model: Any = None) -> BaseException | None:
        try:
            estimate_importance(model or make("llama"), data, "empirical-fisher", progress=False, group=group)
        except Exception as caught:
            return caught
        return None

    def explode(_: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        output.logits = output.logits * torch.where(keywords["input_ids"][:, :1] == 299, torch.nan, 1.0)[..., None]
        return output

    broken = make("llama")
    broken.register_forward_hook(explode, with_kwargs=True)
    samples = list(SAMPLES)
    samples[4] = Sample((299, *SAMPLES[4].input_ids[1:]), SAMPLES[4].labels)
    return [error(samples, broken), error(SAMPLES[: 5 + ranks.rank]), error("nowhere.jsonl")]


def test_what_is_wrong_on_one_rank_ends_all() -> None:
    first, second = on_ranks(2, _refused)
    for found in (first, second):
        not_finite, other_data, nowhere = found
        assert isinstance(not_finite, NotFiniteError)
        assert "the loss of sample 4 (counted from 0)" in str(not_finite)
        assert isinstance(other_data, InputError)
        assert "different data" in str(other_data)
        assert isinstance(nowhere, InputError)


class _Recorder:
    """Stands in for two ranks with the same values, and notes what is sent and when."""

    world = 2

    def __init__(self) -> None:
        self.sent: list[int] = []

    def sum_async_(self, tensor: torch.Tensor) -> Pending:
        self.sent.append(tensor.numel())
        tensor.mul_(2)
        return Pending(None)


def _tensors() -> Tensors:
    return {name: torch.ones(size) for name, size in {"a": 3 << 18, "b": 5, "c": 2 << 18, "d": 7}.items()}


def test_messages_go_out_in_one_order_as_soon_as_they_can() -> None:
    ranks, tensors = _Recorder(), _tensors()
    with OverlappedSum(ranks, tensors) as sums:  # type: ignore[arg-type]
        sums.complete("c")  # in a pass that is not the last
        assert ranks.sent == []
        sums.last_pass()
        sums.complete("a")
        assert ranks.sent == []  # c, a later parameter, goes first
        sums.complete("c")
        assert ranks.sent == [2 << 18, 3 << 18]
        sums.complete("d")
        assert len(ranks.sent) == 2
    assert ranks.sent[2:] == [12]  # the small ones in one message
    assert all(bool((tensor == 2).all()) for tensor in tensors.values())


def test_an_error_sends_the_rest_and_a_lost_rank_does_not() -> None:
    for error, count in ((ValueError(), 3), (RankLost(), 0), (KeyboardInterrupt(), 0)):
        ranks = _Recorder()
        with pytest.raises(type(error)), OverlappedSum(ranks, _tensors()):  # type: ignore[arg-type]
            raise error
        assert len(ranks.sent) == count

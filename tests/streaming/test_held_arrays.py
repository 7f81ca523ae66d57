"""The arrays of a tensor are those of its importances, and few tensors' arrays are there at once."""

from concurrent.futures import ThreadPoolExecutor

import torch

from perta_fast.models.layouts import Run
from perta_fast.streaming.forecast.trial import LiveBytes
from perta_fast.streaming.held_arrays import HeldArrays

SIZE, COUNT = 1000, 20
FORGET, RETAIN = ({str(k): torch.full((SIZE,), float(k + shift)).bfloat16() for k in range(COUNT)} for shift in (0, 1))
RUNS = {k: [Run(str(k), 0, SIZE // 2), Run(str(k), SIZE // 2, SIZE // 2)] for k in range(COUNT)}


def test_they_are_float32_and_right_from_any_thread() -> None:
    arrays = HeldArrays(RUNS, [FORGET, RETAIN])

    def check(index: int) -> None:
        forget, retain = arrays[index // 4]
        assert (forget == index // 4).all() and (retain == index // 4 + 1).all()
        assert forget.dtype == retain.dtype == "float32" and len(forget) == SIZE

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check, range(4 * COUNT)))
    assert list(arrays) == list(RUNS) and arrays.get(COUNT, ()) == ()


def test_those_of_two_tensors_are_kept() -> None:
    arrays = HeldArrays({k: [Run(str(k), 0, SIZE)] for k in RUNS}, [FORGET, RETAIN])
    with LiveBytes([*FORGET.values(), *RETAIN.values()]) as live:
        for index in RUNS:
            assert len(arrays[index]) == 2
    assert live.peak == 2 * 2 * 4 * SIZE

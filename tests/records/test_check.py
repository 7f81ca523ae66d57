"""What the losses of base and tuned tell of files that were exchanged."""

import pytest

from perta_fast.records.check import Check

FORGET_AND_RETAIN, BASE_AND_TUNED = "were forget and retain exchanged?", "were base and tuned exchanged?"


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        ((5.0, 5.0), (0.1, 4.5), ""),  # as it should be
        ((5.0, 5.0), (4.5, 0.1), FORGET_AND_RETAIN),
        ((5.0, 5.0), (8.0, 0.1), FORGET_AND_RETAIN),  # what was learnt harms the other rows
        ((0.1, 4.5), (5.0, 5.0), BASE_AND_TUNED),
        ((0.1, 8.0), (5.0, 5.0), BASE_AND_TUNED),
        ((3.0, 3.0), (6.1, 0.1), FORGET_AND_RETAIN),  # harm and learning are alike: the smallest loss was learnt
        ((0.1, 6.1), (3.0, 3.0), BASE_AND_TUNED),
        ((5.0, 5.0), (3.0, 1.5), ""),  # related rows: both were learnt
        ((5.0, 5.0), (4.0, 2.9), FORGET_AND_RETAIN),
        ((5.0, 5.0), (4.99, 4.95), ""),  # next to nothing was learnt
        ((5.0, None), (5.2, None), BASE_AND_TUNED),
    ],
)
def test_what_was_exchanged(base: tuple[float, float | None], tuned: tuple[float, float | None], said: str) -> None:
    check = Check.begun("perta eval")
    check.base, check.tuned = (dict(zip(("forget", "retain"), losses, strict=True)) for losses in (base, tuned))
    warnings = check.early_warnings()
    assert len(warnings) == (said != "")
    assert all(warning.endswith(said) for warning in warnings)

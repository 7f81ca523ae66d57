"""Rules: the paper's settings, and every setting out of its range named."""

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perta_fast import InputError
from perta_fast.rules import RULES, Rescaling, Rule

NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("name", "estimator", "p"),
    [("tv", None, 1.0), ("grad", "grad", 1.0), ("fisher", "grad", 2.0), ("empirical-fisher", "empirical-fisher", 1.0)],
)
def test_defaults(name: str, estimator: str | None, p: float) -> None:
    assert Rule.of(name, 0.5) == Rule(name, Rescaling(0.5, p, 1.0, None))
    assert Rule.of(name, 0.5).estimator == estimator


def test_every_rule_has_been_looked_at() -> None:
    assert set(RULES) == {"tv", "grad", "fisher", "empirical-fisher"}


@pytest.mark.parametrize("name", ["grad", "fisher", "empirical-fisher"])
def test_settings_are_kept_as_numbers(name: str) -> None:
    rule = Rule.of(name, 2, 3, 0, 0)
    assert astuple(rule.rescaling) == (2.0, 3.0, 0.0, 0)
    assert all(type(value) is float for value in astuple(rule.rescaling)[:3])


@pytest.mark.parametrize("name", ["", "Fisher", "tv ", "task-vector", None, 3])
def test_unknown_rules(name: str) -> None:
    with pytest.raises(InputError, match=r"rule is .*; it must be one of tv, grad, fisher, empirical-fisher"):
        Rule.of(name, 1.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("lam", value) for value in NOT_FINITE),
        *(("p", value) for value in [0.0, -0.0, -1.0, *NOT_FINITE]),
        *(("alpha", value) for value in [-1e-9, -1.0, *NOT_FINITE]),
        *(("threshold", value) for value in [-1e-9, 1.0, 2.0, *NOT_FINITE]),
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_settings_out_of_range(name: str, setting: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{setting} is {value}; it must be"):
        Rule.of(name, **{"lam": 1.0, setting: value})


@pytest.mark.parametrize(
    ("setting", "value"), [("p", 1e39), ("p", 1e-50), ("p", 2.0**-150), ("alpha", 3.5e38), ("alpha", 2.0**128)]
)
def test_settings_that_float32_cannot_hold(setting: str, value: float) -> None:
    assert torch.tensor(value).item() in (0.0, math.inf)
    with pytest.raises(InputError, match=rf"^{setting} is .*, which float32 cannot hold"):
        Rule.of("grad", **{"lam": 1.0, setting: value})


@pytest.mark.parametrize(("setting", "value"), [("p", 7.01e-46), ("p", 3.4028235677973362e38), ("alpha", 3.4e38)])
def test_settings_that_float32_can_hold(setting: str, value: float) -> None:
    assert torch.tensor(value).item() not in (0.0, math.inf)
    Rule.of("grad", **{"lam": 1.0, setting: value})


@pytest.mark.parametrize("setting", [{"p": 2.0}, {"alpha": 0.5}, {"threshold": 0.0}])
def test_a_rule_without_weights_takes_no_settings_of_weights(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match="rule tv has no weights: p, alpha and threshold do not apply"):
        Rule.of("tv", 1.0, **setting)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    finite.filter(lambda p: p > 0),
    finite.filter(lambda alpha: alpha >= 0),
    st.none() | st.floats(0, 1, exclude_max=True),
)
def test_everything_in_range_passes(lam: float, p: float, alpha: float, threshold: float | None) -> None:
    assert Rescaling(lam, p, alpha, threshold).lam == lam
    assert Rule.of("grad", lam, p, alpha, threshold).rescaling.p == p

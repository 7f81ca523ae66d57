"""Arguments with numbers of other libraries' kinds, checked by declared types."""

import json
from dataclasses import asdict, dataclass
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perta_fast import InputError, apply, estimate_importance, evaluate, merge, precondition, sweep, tune, unlearn
from perta_fast.arguments import plain
from perta_fast.evaluation.request import Request
from perta_fast.records.declared import checked_arguments, declared


class Rule(StrEnum):
    TV = "tv"


class Count(IntEnum):
    TWO = 2


@dataclass(frozen=True)
class Asked:
    lams: list[float]
    count: int | None
    rule: str
    stream: bool
    fields: dict[str, str] | None = None


NUMBERS = [
    np.int64(2),
    np.float32(2),
    np.array(2),
    torch.tensor(2),
    torch.tensor(2.0),
    Fraction(2),
    Decimal(2),
    Count.TWO,
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_a_number_of_any_kind_is_python_s_own(number: Any) -> None:
    made = plain({"a": number, "b": [number, (number,)]})
    kind = type(made["a"])
    assert kind in (int, float)
    assert json.loads(json.dumps(made)) == {"a": 2, "b": [2, [2]]}
    assert [type(made["b"][0]), type(made["b"][1][0]), type(made["b"][1])] == [kind, kind, tuple]


def test_flags_texts_and_arrays_too() -> None:
    assert plain([np.bool_(True), np.False_, True, None]) == [True, False, True, None]
    assert plain(np.bool_(True)) is True
    assert [type(plain(text)) for text in (Rule.TV, np.str_("tv"), "tv")] == [str, str, str]
    assert plain(Rule.TV) == "tv"
    assert plain(np.linspace(0, 1, 3)) == plain(torch.linspace(0, 1, 3)) == [0.0, 0.5, 1.0]
    for other in (Path("a"), torch.float32, object(), {1}):
        assert plain(other) is other


def test_a_dataclass_of_such_values() -> None:
    made = declared(
        Asked,
        {"lams": [1, np.int8(2)], "count": np.int64(3), "rule": Rule.TV, "stream": np.True_, "fields": None, "x": 1},
    )
    assert made == Asked([1.0, 2.0], 3, "tv", True)
    assert [type(value) for value in (*made.lams, made.count, made.rule, made.stream)] == [float, float, int, str, bool]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lams": ["a"]}, r"^lam\[0\] is 'a', not a number$"),
        ({"lams": 1.0}, r"^lam is 1\.0, not a list$"),
        ({"lams": [True]}, r"^lam\[0\] is True, not a number$"),
        ({"count": 2.5}, r"^count is 2\.5, not a whole number$"),
        ({"stream": "no"}, r"^stream is 'no', not true or false$"),
    ],
)
def test_what_is_of_another_type_is_refused_by_its_name(wrong: dict[str, Any], message: str) -> None:
    good = {"lams": [1.0], "count": None, "rule": "tv", "stream": False, "fields": None}
    with pytest.raises(InputError, match=message):
        declared(Asked, good | wrong, {"lams": "lam"})


def test_the_record_of_an_evaluation_is_json() -> None:
    given: dict[str, Any] = {"forget": "f", "batch_size": np.int64(8), "min_k": np.float32(0.5)}
    given |= {"show_text": np.True_, "max_length": np.int8(9), "memory": np.int64(1 << 40), "stream": np.bool_(True)}
    arguments = {name: parameter.default for name, parameter in signature(evaluate).parameters.items()}
    request = Request.of(arguments | given | {"model_or_path": Path("m")})
    request.check()
    kept = json.loads(json.dumps(asdict(request)))
    assert {name: kept[name] for name in given} == given


def test_a_function_whose_arguments_are_checked() -> None:
    @checked_arguments
    def made(lam: float, count: int | None = None, *, stream: bool = False, data: Any = ()) -> Any:
        return lam, count, stream, data

    rows = [np.int64(1)]
    assert made(np.int64(1), np.int8(2), stream=np.True_, data=rows) == (1.0, 2, True, rows)
    assert made(1, data=rows)[3] is rows
    for wrong in ({"lam": "a"}, {"lam": 1, "count": 1.5}, {"lam": 1, "stream": 1}):
        with pytest.raises(InputError, match=f"^{list(wrong)[-1]} is .*, not "):
            made(**wrong)
    with pytest.raises(TypeError, match=r"made\(\) takes from 1 to 2 positional arguments but 3 were given"):
        made(1, 2, True)


@pytest.mark.parametrize(
    ("function", "flags"),
    [
        (apply, ("in_place", "overwrite", "link_unchanged", "drop_cache", "common_rows", "allow_zero", "download")),
        (unlearn, ("in_place", "stream", "check", "drop_cache", "link_unchanged", "allow_zero", "leave_others")),
        (sweep, ("in_place", "stream", "overwrite", "common_rows", "leave_others")),
        (evaluate, ("stream", "show_text")),
        (tune, ("full", "gradient_checkpointing")),
        (merge, ("allow_zero", "overwrite")),
        (precondition, ("stream", "overwrite")),
        (estimate_importance, ("stream", "overwrite")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_flag_that_is_none_is_refused_by_name(function: Any, flags: tuple[str, ...]) -> None:
    inputs: dict[Any, Any] = {
        evaluate: {"model_or_path": "m", "forget": "f"},
        tune: {"base": "b", "forget": "f", "out": "o"},
        merge: {"base": "b", "tuned": "t", "out": "o"},
        precondition: {"base": "b", "tuned": "t", "retain": "r", "out": "o"},
        estimate_importance: {"model_or_path": "m", "data": "d"},
    }
    three = {"model": "m", "base": "b", "tuned": "t"} | ({} if function is apply else {"forget": "f", "retain": "r"})
    for flag in flags:
        with pytest.raises(InputError, match=f"^{flag} is 'no', not true or false$"):
            function(**inputs.get(function, three) | {flag: "no"})

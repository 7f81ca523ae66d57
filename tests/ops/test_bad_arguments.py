"""Any mixture of wrong arguments gives a result, or a TypeError or ValueError that names one of them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perta_fast import ops

SHAPE = (3, 4)


def freed() -> Tensor:
    tensor = torch.zeros(SHAPE)
    tensor.untyped_storage().resize_(0)
    return tensor


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        return torch.nested.nested_tensor([torch.zeros(4), torch.zeros(4), torch.zeros(4)])


TENSORS: dict[str, Callable[[], Any]] = {
    "good": lambda: torch.zeros(SHAPE),
    "good too": lambda: torch.ones(SHAPE, dtype=torch.bfloat16, requires_grad=True),
    "none": lambda: None,
    "number": lambda: 3.0,
    "text": lambda: "theta",
    "list": lambda: [[0.0] * 4] * 3,
    "array": lambda: torch.zeros(SHAPE).numpy(),
    "dtype": lambda: torch.zeros(SHAPE, dtype=torch.float64),
    "integers": lambda: torch.zeros(SHAPE, dtype=torch.int64),
    "complex": lambda: torch.zeros(SHAPE, dtype=torch.complex64),
    "float8": lambda: torch.zeros(SHAPE, dtype=torch.float8_e4m3fn),
    "shape": lambda: torch.zeros(12),
    "smaller": lambda: torch.zeros(3, 3),
    "scalar": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0, 4),
    "strided": lambda: torch.zeros(3, 8)[:, ::2],
    "transposed": lambda: torch.zeros(4, 3).T,
    "expanded": lambda: torch.zeros(1, 4).expand(SHAPE),
    "meta": lambda: torch.zeros(SHAPE, device="meta"),
    "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
    "nested": nested,
    "freed": freed,
}
NUMBERS: dict[str, Any] = {
    "one": 1.0,
    "whole": 2,
    "nan": float("nan"),
    "infinite": float("-inf"),
    "negative": -1.0,
    "none": None,
    "text": "1",
    "complex": 1j,
    "list": [1.0],
}
BACKENDS: tuple[Any, ...] = ("auto", "reference", "cpp", "cuda", "triton", "fast", None, 1, ["cpp"])
SUBTRACTION = ("theta", "tuned", "base", "forget_importance", "retain_importance")
ACCUMULATE = ("accumulator", "gradient")
FISHER = ("fisher", "gradient", "activations", "output_gradients")
MANY = tuple(f"{name}s" for name in SUBTRACTION)
MANY_ACCUMULATE = tuple(f"{name}s" for name in ACCUMULATE)

tensors = st.one_of(st.just("good"), st.sampled_from(list(TENSORS)))
numbers = st.one_of(st.just("one"), st.sampled_from(list(NUMBERS)))


def call(operation: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Run it; an error must be of the right kind and name an argument."""
    try:
        operation(**arguments)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in arguments), repr(error)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([ops.rescaled_subtract_, ops.rescaled_subtract]),
    st.tuples(*[tensors] * 5),
    st.tuples(*[numbers] * 4),
    st.sampled_from(BACKENDS),
    st.none() | st.tuples(st.sampled_from(SUBTRACTION), st.sampled_from(SUBTRACTION)),
)
def test_subtraction(
    operation: Callable[..., Any],
    chosen: tuple[str, ...],
    values: tuple[str, ...],
    backend: Any,
    alias: tuple[str, str] | None,
) -> None:
    made = {name: TENSORS[kind]() for name, kind in zip(SUBTRACTION, chosen, strict=True)}
    if alias is not None and isinstance(made[alias[0]], Tensor):
        made[alias[1]] = made[alias[0]]
    names = ("lam", "p", "alpha", "threshold")
    made |= {name: NUMBERS[kind] for name, kind in zip(names, values, strict=True)}
    call(operation, made | {"backend": backend})


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([ops.accumulate_, ops.accumulate_square_]),
    st.tuples(*[tensors] * 2),
    st.sampled_from(BACKENDS),
    st.booleans(),
)
def test_accumulate(operation: Callable[..., Any], chosen: tuple[str, ...], backend: Any, alias: bool) -> None:
    made = {name: TENSORS[kind]() for name, kind in zip(ACCUMULATE, chosen, strict=True)}
    if alias:
        made["gradient"] = made["accumulator"]
    call(operation, made | {"backend": backend})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[tensors] * 5), max_size=3), st.integers(0, 4), st.sampled_from(list(TENSORS)), st.data())
def test_many(chosen: list[tuple[str, ...]], place: int, instead: str, data: st.DataObject) -> None:
    lists: dict[str, Any] = {name: [TENSORS[kinds[k]]() for kinds in chosen] for k, name in enumerate(MANY)}
    if data.draw(st.booleans()):
        lists[MANY[place]] = TENSORS[instead]()  # not a list
    elif data.draw(st.booleans()):
        lists[MANY[place]] = lists[MANY[place]][:1]
    elif data.draw(st.booleans()):
        lists[MANY[place]] = lists["thetas"]
    call(ops.rescaled_subtract_many_, lists | {"lam": 1.0})
    pairs = dict(zip(MANY_ACCUMULATE, (lists["thetas"], lists["tuneds"]), strict=True))
    call(ops.accumulate_many_, pairs)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[tensors] * 4),
    st.sampled_from([None, "lengths", *TENSORS]),
    st.sampled_from(BACKENDS),
    st.none() | st.tuples(st.sampled_from(FISHER), st.sampled_from(FISHER)),
)
def test_fisher(chosen: tuple[str, ...], lengths: str | None, backend: Any, alias: tuple[str, str] | None) -> None:
    """All arrays are 3 x 4 but the output gradients, which are 3 x 3: the linear map is 3 x 4, on 3 rows."""
    made = {name: TENSORS[kind]() for name, kind in zip(FISHER, chosen, strict=True)}
    deltas = made["output_gradients"]
    if isinstance(deltas, Tensor) and deltas.layout == torch.strided and not deltas.is_nested and deltas.dim() == 2:
        made["output_gradients"] = deltas if chosen[3] == "freed" else deltas[:, :3].contiguous()
    if alias is not None:
        made[alias[1]] = made[alias[0]]
    given = torch.tensor([1, 0, 2]) if lengths == "lengths" else lengths and TENSORS[lengths]()
    call(ops.accumulate_squared_gradients_, made | {"lengths": given, "backend": backend})

"""Which tensors may meet: names, shapes, types, tied heads, importances; settled before a byte is written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.subtraction.matching import TensorMatch, match_tensors
from tests.support.checkpoints import draw, write_checkpoint, write_importance

EMBED, HEAD, INNER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.weight"
UNTIED = {EMBED: draw((6, 4), seed=1), INNER: draw((4, 4), seed=2), HEAD: draw((6, 4), seed=3)}
STORED_TWICE = UNTIED | {HEAD: UNTIED[EMBED]}
STORED_ONCE = {EMBED: UNTIED[EMBED], INNER: UNTIED[INNER]}


class Room:
    """Writes checkpoints into numbered folders and plans with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def checkpoint(self, role: str, tensors: dict[str, Tensor]) -> Checkpoint:
        return Checkpoint.open(write_checkpoint(self._folder / role, tensors))

    def importance(self, role: str, tensors: dict[str, Tensor]) -> Checkpoint:
        return Checkpoint.open(write_importance(self._folder / role, tensors), "importance")

    def plan(
        self,
        model: dict[str, Tensor],
        base: dict[str, Tensor] | None = None,
        tuned: dict[str, Tensor] | None = None,
        forget: dict[str, Tensor] | None = None,
        retain: dict[str, Tensor] | None = None,
    ) -> dict[str, TensorMatch]:
        """The plan by tensor name; base and tuned are the model, retain is forget, unless given."""
        retain = forget if retain is None else retain
        plans = match_tensors(
            self.checkpoint("model", model),
            self.checkpoint("base", model if base is None else base),
            self.checkpoint("tuned", model if tuned is None else tuned),
            None if forget is None else self.importance("forget", forget),
            None if retain is None else self.importance("retain", retain),
        )
        return {plan.theta.name: plan for plan in plans}


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def sources(plan: TensorMatch) -> list[tuple[str, str] | None]:
    """Folder and tensor name of each source."""
    entries = (plan.theta, plan.base, plan.tuned, plan.forget_importance, plan.retain_importance)
    return [None if entry is None else (entry.path.parent.name, entry.name) for entry in entries]


def test_every_tensor_meets_its_namesakes(room: Room) -> None:
    plans = room.plan(UNTIED, forget=UNTIED)
    assert plans.keys() == UNTIED.keys()
    for name, plan in plans.items():
        assert sources(plan) == [(role, name) for role in ("model", "base", "tuned", "forget", "retain")]
        assert plan.copied is None


def test_without_importances_there_are_three_sources(room: Room) -> None:
    assert sources(room.plan(UNTIED)[INNER]) == [
        ("model", INNER), ("base", INNER), ("tuned", INNER), None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_missing_tensor_is_named(role: str, room: Room) -> None:
    lacking = {name: tensor for name, tensor in UNTIED.items() if name != INNER}
    with pytest.raises(InputError, match=rf"{role}: lacks tensor {INNER}, which .*model has"):
        room.plan(UNTIED, **{role: lacking})


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_an_extra_tensor_is_named(role: str, room: Room) -> None:
    with pytest.raises(InputError, match=rf"{role}: has tensor extra, which .*model lacks"):
        room.plan(UNTIED, **{role: UNTIED | {"extra": draw((2,))}})


def test_many_missing_tensors_are_counted(room: Room) -> None:
    model = {f"t{k}": draw((2,), seed=k) for k in range(9)}
    with pytest.raises(InputError, match=r"lacks tensors t1, t2, t3 and 5 more"):
        room.plan(model, base={"t0": model["t0"]})


@pytest.mark.parametrize("role", ["base", "tuned", "forget", "retain"])
def test_a_shape_that_differs_is_named_with_both_shapes(role: str, room: Room) -> None:
    others = {"forget": UNTIED, "retain": UNTIED} | {role: UNTIED | {INNER: draw((4, 5))}}
    with pytest.raises(InputError, match=rf"tensor {INNER}: shape \[4, 4\] in .*model.*, \[4, 5\] in .*{role}"):
        room.plan(UNTIED, **others)


@pytest.mark.parametrize("role", ["model", "base", "tuned", "forget", "retain"])
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")]
)
def test_types_without_arithmetic_are_refused_by_name(role: str, dtype: torch.dtype, name: str, room: Room) -> None:
    checkpoints = {"model": UNTIED, "base": UNTIED, "tuned": UNTIED, "forget": UNTIED, "retain": UNTIED}
    checkpoints[role] = UNTIED | {INNER: UNTIED[INNER].to(dtype)}
    advice = "there is no arithmetic for complex numbers here; keep it" if name == "C64" else "save the checkpoint as"
    with pytest.raises(InputError, match=rf"tensor {INNER} in .*{role}.* is {name}; {advice}"):
        room.plan(**checkpoints)


@pytest.mark.parametrize("role", ["model", "base", "tuned"])
@pytest.mark.parametrize("name", [EMBED, INNER])
def test_a_tensor_that_was_saved_without_its_elements_is_named_so(role: str, name: str, room: Room) -> None:
    checkpoints = {"model": UNTIED, "base": UNTIED, "tuned": UNTIED}
    checkpoints[role] = UNTIED | {name: torch.empty(0)}
    with pytest.raises(InputError, match=rf"{role}.*: tensor {name} has shape \[0\]: DeepSpeed ZeRO-3 or FSDP"):
        room.plan(**checkpoints)


def test_the_three_types_may_be_mixed(room: Room) -> None:
    def as_type(dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in UNTIED.items()}

    plans = room.plan(as_type(torch.bfloat16), UNTIED, as_type(torch.float16), UNTIED, as_type(torch.bfloat16))
    assert all(plan.copied is None for plan in plans.values())


def test_integer_buffers_are_copied_wherever_else_they_are(room: Room) -> None:
    ids, mask = torch.arange(7), torch.ones(3, dtype=torch.bool)
    plans = room.plan(
        UNTIED | {"ids": ids, "mask": mask}, base=UNTIED | {"ids": ids[:3], "other": ids}, tuned=UNTIED, forget=UNTIED
    )
    assert sources(plans["ids"]) == [("model", "ids"), None, None, None, None]
    assert {name for name, plan in plans.items() if plan.copied == "not floating point"} == {"ids", "mask"}
    assert plans.keys() == {*UNTIED, "ids", "mask"}


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_quantised_weights_are_not_taken_for_a_buffer(role: str, room: Room) -> None:
    quantised = UNTIED | {INNER: UNTIED[INNER].to(torch.int8)}
    with pytest.raises(InputError, match=rf"tensor {INNER} is I8 in .*model.*, F32 in .*{role}.*quantised"):
        room.plan(quantised, **({"base": quantised, "tuned": quantised} | {role: UNTIED}))


@pytest.mark.parametrize("base", [STORED_ONCE, STORED_TWICE])
@pytest.mark.parametrize("tuned", [STORED_ONCE, STORED_TWICE])
def test_a_tied_head_may_be_stored_or_left_out(base: dict[str, Tensor], tuned: dict[str, Tensor], room: Room) -> None:
    plans = room.plan(STORED_ONCE, base, tuned)
    assert plans.keys() == STORED_ONCE.keys()
    assert sources(plans[EMBED])[:3] == [("model", EMBED), ("base", EMBED), ("tuned", EMBED)]


@pytest.mark.parametrize("model", [UNTIED, STORED_TWICE])
@pytest.mark.parametrize("base", [STORED_ONCE, STORED_TWICE])
@pytest.mark.parametrize("tuned", [STORED_ONCE, STORED_TWICE])
def test_a_stored_head_meets_the_embedding_that_stands_for_it(
    model: dict[str, Tensor], base: dict[str, Tensor], tuned: dict[str, Tensor], room: Room
) -> None:
    plans = room.plan(model, base, tuned)
    assert plans.keys() == UNTIED.keys()
    assert sources(plans[HEAD])[:3] == [
        ("model", HEAD),
        ("base", HEAD if HEAD in base else EMBED),
        ("tuned", HEAD if HEAD in tuned else EMBED),
    ]


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_an_untied_head_is_not_dropped_for_a_tied_model(role: str, room: Room) -> None:
    with pytest.raises(InputError, match=rf"{role}: {HEAD} differs from {EMBED}, but .*model ties the two"):
        room.plan(STORED_ONCE, **{role: UNTIED})


def test_a_tied_pair_shares_the_importance_of_either_name(room: Room) -> None:
    plans = room.plan(STORED_TWICE, forget=STORED_ONCE)
    assert sources(plans[HEAD])[3:] == [("forget", EMBED), ("retain", EMBED)]
    assert sources(plans[EMBED])[3:] == [("forget", EMBED), ("retain", EMBED)]


def test_an_untied_head_does_not_borrow_the_importance_of_the_embedding(room: Room) -> None:
    assert room.plan(UNTIED, forget=STORED_ONCE)[HEAD].copied == "not covered by the importance"


def test_what_the_importance_does_not_cover_is_copied(room: Room) -> None:
    # Of a type that could not be computed with: it need not be.
    model = UNTIED | {"frozen": draw((2,), torch.float64)}
    plans = room.plan(model, forget=UNTIED)
    assert plans["frozen"].copied == "not covered by the importance"
    assert all(plans[name].copied is None for name in UNTIED)


def test_an_importance_of_another_model_is_refused(room: Room) -> None:
    with pytest.raises(InputError, match=r"forget: has tensor other, which .*model lacks"):
        room.plan(UNTIED, forget=UNTIED | {"other": draw((2,))})


@pytest.mark.parametrize("smaller", ["forget", "retain"])
def test_importances_that_cover_different_tensors_are_refused(smaller: str, room: Room) -> None:
    larger = {"forget": "retain", "retain": "forget"}[smaller]
    with pytest.raises(InputError, match=rf"{smaller}: lacks tensor {HEAD}, which .*{larger} has"):
        room.plan(UNTIED, **{smaller: STORED_ONCE, larger: UNTIED})

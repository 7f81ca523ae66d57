"""Which names the patterns of ``--only`` and ``--leave`` stand for, and what is said of those that stand for none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.tied import ties_embeddings
from perta_fast.errors import InputError
from perta_fast.models.held_tensors import held_tensors
from perta_fast.models.stored_names import as_stored
from perta_fast.subtraction.on_module import _names
from perta_fast.subtraction.scope import Names, Scope
from tests.families.configs import FAMILIES, Family
from tests.families.matrix import build
from tests.support.checkpoints import draw, write_checkpoint

LAYER = [f"model.layers.{k}.{part}.weight" for k in range(12) for part in ("mlp.up_proj", "input_layernorm")]
NAMES = Names(dict.fromkeys([*LAYER, "lm_head.weight", "model.embed_tokens.weight"], (4, 4)))


@pytest.mark.parametrize(
    ("only", "leave", "left"),
    [
        (None, "*norm*", {name for name in LAYER if "norm" in name}),
        (None, "*norm*, lm_head.weight", {name for name in LAYER if "norm" in name} | {"lm_head.weight"}),
        (["model.layers.1.*"], None, NAMES.shapes.keys() - {name for name in LAYER if ".1." in name}),
        ("model.layers.1?.*", "*norm*", NAMES.shapes.keys() - {f"model.layers.1{k}.mlp.up_proj.weight" for k in "01"}),
        ("*[ad].weight", [], set(LAYER) | {"model.embed_tokens.weight"}),
        (None, ("norms", "embeddings"), {n for n in NAMES.shapes if "up_proj" not in n}),
        (None, [], set()),
        (None, None, set()),
    ],
)  # fmt: skip
def test_names_that_are_left(only: Any, leave: Any, left: set[str]) -> None:
    assert Scope.of(only, leave).left(NAMES) == left


@pytest.mark.parametrize(
    ("only", "leave", "said"),
    [
        (None, "*embd_tokens*", r"leave \*embd_tokens\*: no parameter .* close to it: model.embed_tokens.weight"),
        (None, "model.layer.3.mlp.*", "close to it: model.layers.0.mlp.up_proj.weight"),
        ("lm_head", None, r"only lm_head: .* whole names: \*lm_head\* stands for 1, such as lm_head.weight"),
        (None, "norm", r"whole names: \*norm\* stands for 12"),
        (None, "LM_HEAD.weight", "upper and lower case count: lm_head.weight"),
        (None, "model.layers.{0,1}.*", "braces mean nothing here"),
        (None, "embedding", "did you mean embeddings?"),
        (None, "*xyz*", "one of its names: lm_head.weight"),
        (None, "lm_head.weight,*nothing*", r"leave \*nothing\*"),
        ("*", "*", r"^only \* with leave \*: leaves every parameter of the module alone"),
        (None, ["*norm*", "*proj*", "embeddings"], r"leave \*norm\*,\*proj\*,embeddings: leaves every"),
        ("", None, "only has the pattern ''"),
        (None, "a,,b", "leave has the pattern ''"),
        (None, ["a", 3], "leave has the pattern 3"),
        ([], None, "only is an empty list"),
    ],
)
def test_patterns_that_are_refused(only: Any, leave: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Scope.of(only, leave).left(NAMES)


def test_a_group_that_a_model_lacks() -> None:
    with pytest.raises(InputError, match=r"^leave norms: no parameter .* leave it out, or give patterns"):
        Scope.of(None, "norms").left(Names({"wte.weight": (3, 3), "h.0.mlp.weight": (3, 3)}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_groups_of_every_family(family: Family) -> None:
    """They are what transformers calls its embeddings, and the modules whose class is a norm."""
    module = build(family, 0)
    held = held_tensors(module)
    names = _names(module, held)

    def stored(modules: set[nn.Module]) -> set[str]:
        found = {
            f"{name}.{parameter}": torch.empty(values.shape, device="meta")
            for name, of in module.named_modules()
            if of in modules
            for parameter, values in of.named_parameters(recurse=False)
        }
        return {one for name, values in found.items() for one in as_stored(module, {name: values})} & held.keys()

    embeddings = stored({module.get_input_embeddings(), module.get_output_embeddings()})
    assert names.matching("embeddings") == embeddings and embeddings
    assert names.matching("norms") == stored({of for of in module.modules() if "Norm" in type(of).__name__})


@pytest.mark.parametrize("stored", [["model.embed_tokens.weight"], ["lm_head.weight"], None])
@pytest.mark.parametrize("pattern", ["lm_head.weight", "*embed_tokens*", "embeddings", "*lm_head*"])
def test_a_tied_matrix_goes_by_both_names(stored: list[str] | None, pattern: str, tmp_path: Path) -> None:
    stored = stored or ["model.embed_tokens.weight", "lm_head.weight"]
    folder = write_checkpoint(
        tmp_path / "model", {name: draw((7, 5)) for name in stored} | {"model.up.weight": draw((5, 5))}
    )
    (folder / "config.json").write_text('{"tie_word_embeddings": true, "vocab_size": 7}')
    model = Checkpoint.open(folder)
    names = Names.of(model, ties_embeddings(model))
    assert Scope.of(None, pattern).left(names) == set(stored)
    assert Scope.of(pattern, None).left(names) == {"model.up.weight"}


def test_two_matrices_that_are_not_tied_are_two(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": draw((7, 5)), "lm_head.weight": draw((7, 5), seed=1)}
    model = Checkpoint.open(write_checkpoint(tmp_path / "model", tensors))
    assert Scope.of(None, "lm_head.weight").left(Names.of(model, ties_embeddings(model))) == {"lm_head.weight"}

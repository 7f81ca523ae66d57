"""How rows were put to the model: with which chat template, date and system prompt, and whether a BOS was put first."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

from perta_fast.data.chat import shown, told
from perta_fast.data.rows import Row
from perta_fast.data.samples import Sample

CHAT, PLAIN, TEXT, TOKENS = "chat template", "Question: ... Answer:", "text as it is", "tokens as they are"


def prompt_used(tokenizer: Any, rows: Sequence[Row], samples: Sequence[Sample]) -> dict[str, Any]:
    """For the settings of an evaluation; ``samples`` are those of ``rows``.

    forms: of the prompts, any of the four above. chat_template: the BLAKE3 hash of the one that was used.
    system_prompt: as it was given. date: what the template was told. bos: how many BOS tokens samples begin with, each
    number that occurs.
    """
    forms = dict.fromkeys(_form(row, bool(tokenizer.chat_template)) for row in rows)
    used = told(tokenizer)
    hashed = None
    if CHAT in forms:
        template = tokenizer.chat_template  # a text, or several by name
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        hashed = blake3(text.encode()).hexdigest()
    return {
        "forms": list(forms),
        "chat_template": hashed,
        "system_prompt": used.system_prompt,
        "date": used.date,
        "bos": sorted({_leading(sample.input_ids, tokenizer.bos_token_id) for sample in samples}),
    }


def _form(row: Row, has_template: bool) -> str:
    if row.is_tokenised:
        return TOKENS
    return TEXT if "text" in row.content else CHAT if has_template else PLAIN


def both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What was used for two sets of rows."""
    listed = {key: list(dict.fromkeys([*first[key], *second[key]])) for key in ("forms", "bos")}
    others = {key: second[key] if first[key] is None else first[key] for key in first.keys() - listed.keys()}
    return {key: (listed | others)[key] for key in first}


def in_words(used: Mapping[str, Any]) -> str:
    """One line for the summary."""
    parts = [form for form in used["forms"] if form != CHAT]
    if CHAT in used["forms"]:
        prompt, date = used["system_prompt"], used["date"]
        parts.insert(0, f"{CHAT} {used['chat_template'][:8]}")
        parts.append("no system prompt given" if prompt is None else f"system prompt {shown(prompt)}")
        parts.append("no date asked for" if date is None else f"date {date}")
    return f"prompts: {', '.join([*parts, _bos_in_words(used['bos'])])}"


def _bos_in_words(counts: Sequence[int]) -> str:
    words = {0: "no BOS", 1: "a BOS first"}
    return " or ".join(words.get(count, f"{count} BOS first") for count in counts)


def _leading(ids: Sequence[int], token: int | None) -> int:
    """How often ``token`` stands at the start."""
    return next((k for k, other in enumerate(ids) if other != token), len(ids))

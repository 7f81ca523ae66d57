"""A system prompt and a date for every question that a tokenizer's chat template puts."""

import copy
import json
from typing import TYPE_CHECKING

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = (
    '{{% if messages[0]["role"] != "system" %}}'
    '{{% set messages = [{{"role": "system", "content": {}}}] + messages %}}{{% endif %}}'
)
_DATE = "{{% set date_string = {} %}}"


def with_chat_settings(
    tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None, date_string: str | None
) -> "PreTrainedTokenizerBase":
    """A tokenizer whose chat template has these fixed; ``tokenizer`` itself if both are None.

    system_prompt: put before messages that have none. date_string: what templates such as Llama-3's, which name
    it so, give as today's date. Raises InputError if there is no chat template.
    """
    settings = {"system_prompt": (_SYSTEM, system_prompt), "date_string": (_DATE, date_string)}
    given = {name: form.format(json.dumps(text)) for name, (form, text) in settings.items() if text is not None}
    if not given:
        return tokenizer
    if not isinstance(tokenizer.chat_template, str):
        raise InputError(
            f"{' and '.join(given)}: the tokenizer has no chat template to put it in; leave it out"
        )
    changed = copy.copy(tokenizer)
    changed.chat_template = "".join(given.values()) + tokenizer.chat_template
    return changed

"""A system prompt and a date for a tokenizer's chat template."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_chat_settings(
    tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None, date_string: str | None
) -> "PreTrainedTokenizerBase":
    """A tokenizer whose chat template gets these settings; ``tokenizer`` itself if both are None.

    system_prompt: put before messages that have none. date_string: today's date, as templates such as Llama-3's call
    it. Raises InputError if there is no chat template.
    """
    settings = {"system_prompt": system_prompt, "date_string": date_string}
    names = [name for name, text in settings.items() if text is not None]
    if not names:
        return tokenizer
    if not isinstance(tokenizer.chat_template, str):
        raise InputError(f"{' and '.join(names)}: the tokenizer has no chat template to put it in; leave it out")

    def apply(messages: Sequence[dict[str, str]], *arguments: Any, **options: Any) -> Any:
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        if date_string is not None:
            options["date_string"] = date_string
        return tokenizer.apply_chat_template(messages, *arguments, **options)

    changed = copy.copy(tokenizer)
    changed.apply_chat_template = apply
    return changed

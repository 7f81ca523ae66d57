#!/usr/bin/env bash
# transformers 5.24.0: a chat template that asks for the date cannot be given a date of one's own.
#
# Templates ask the function strftime_now (gpt-oss, Granite, Mistral, SmolLM3), so the tokens of a prompt change with the
# day, and with them losses and gradients. Arguments of apply_chat_template reach the template, and others override what
# transformers puts there, such as eos_token. A function does not: in its place the template gets the text "<function>",
# and asking for the date fails. So a run can fix the day of such a template by no argument.
# Seen: {{ eos_token }} is overridden; strftime_now raises TypeError: 'str' object is not callable.
# This script fails if the function reaches the template.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="</s>")
talk = [{"role": "user", "content": "a"}]


def render(template, **settings):
    return words.apply_chat_template(talk, chat_template=template, tokenize=False, **settings)


print("eos_token:", render("{{ eos_token }}"), "->", render("{{ eos_token }}", eos_token="<end>"))
assert render("{{ eos_token }}", eos_token="<end>") == "<end>"
assert render("{{ strftime_now('%Y') }}").isdigit()
try:
    print("strftime_now:", render("{{ strftime_now('%Y') }}", strftime_now=lambda form: "2025"))
except TypeError as error:
    print("strftime_now: TypeError:", error)
else:
    raise SystemExit("the function reached the template")
PYTHON

#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1) with transformers 5.24.0: a tool of a row shows the model the parameters of other rows'.
#
# A column of a data set has one type. Where rows have tools with different parameters, as function-calling data has, the
# type is the union of all: each tool comes back with the parameters of every other tool of the data set, as null. A chat
# template that writes tools as JSON then shows them to the model, so the prompt of a row depends on the other rows.
# Nothing is said. The same holds of messages: "tool_calls" is there in each, as null, once one message has it.
# Seen: the row's own tool {"x"}, written as {"x": {"type": "integer"}, "y": null}.
# This script fails if the tool comes back as it was given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 transformers==5.24.0 jinja2==3.1.6
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder" venv/bin/python - <<'PYTHON'
from datasets import Dataset
from transformers.utils.chat_template_utils import render_jinja_template


def tool(name, parameter, kind):
    parameters = {"type": "object", "properties": {parameter: {"type": kind}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


rows = [{"tools": [tool("double", "x", "integer")]}, {"tools": [tool("shout", "y", "string")]}]
rows = [{**row, "messages": [{"role": "user", "content": "Go."}]} for row in rows]
template = "{% for tool in tools %}{{ tool.function.parameters.properties | tojson }}{% endfor %}"


def prompt(row):
    return render_jinja_template([row["messages"]], tools=row["tools"], chat_template=template)[0][0]


given, read = prompt(rows[0]), prompt(Dataset.from_list(rows)[0])
print(f"given: {given}\nread:  {read}")
assert given == '{"x": {"type": "integer"}}'
assert read != given and '"y": null' in read
PYTHON

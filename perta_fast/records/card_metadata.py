"""The metadata of a model card, in the hub's fields: those that are known and that the card does not have yet.

What a card says already stays, byte by byte. No path and no text of the data is among them; ``datasets`` neither, as it
names what a model was trained on, and this one is to have lost a part of it.
"""

import re
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.hub import hub_name
from perta_fast.files.reading import exists, read_json
from perta_fast.records.report import Report

_FENCE = "---\n"
_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:\s|$)", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
_TAGS = {False: ("unlearning", "perta_fast"), True: ("perta_fast",)}


def with_metadata(card: str, directory: Path, report: Report) -> str:
    """``card`` with the fields that it lacks. A card that has text but no fields stays without.

    directory: where the model's ``config.json`` is.
    """
    found = _fields(directory, report)
    if not card.strip():
        return "".join([_FENCE, *(_lines(key, value) for key, value in found.items()), _FENCE])
    end = card.find("\n" + _FENCE, len(_FENCE) - 1) if card.startswith(_FENCE) else -1
    if end < 0:
        return card
    known, rest = card[len(_FENCE) : end + 1], card[end + 1 :]
    keys = _keys(known)
    if keys is None:
        return card
    lacking = {key: value for key, value in found.items() if key not in keys}
    if "base_model" in keys:
        lacking.pop("base_model_relation", None)
    known = _with_tags(known, _TAGS[report.merged]) if "tags" in keys else known
    return "".join([_FENCE, known, *(_lines(key, value) for key, value in lacking.items()), rest])


def _fields(directory: Path, report: Report) -> dict[str, str | tuple[str, ...]]:
    config = _config(directory)
    fields: dict[str, str | tuple[str, ...]] = {"library_name": "transformers"}
    model = report.inputs.get("model")
    if model is not None and (name := hub_name(model["path"])) is not None:
        fields |= {"base_model": name, "base_model_relation": "finetune"}
    if isinstance(license := config.get("license"), str) and _PLAIN.fullmatch(license):
        fields["license"] = license.lower()
    kinds = config.get("architectures")
    if isinstance(kinds, list) and kinds and str(kinds[0]).endswith("ForCausalLM"):
        fields["pipeline_tag"] = "text-generation"
    return fields | {"tags": _TAGS[report.merged]}


def _config(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    try:
        content = read_json(path) if exists(path) else {}
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def _keys(known: str) -> set[str] | None:
    """The keys at the beginnings of lines; None for fields that are not written line by line."""
    keys = set()
    for line in known.splitlines():
        if not line.strip() or line[0] in " #-":
            continue
        key = _KEY.match(line)
        if key is None:
            return None
        keys.add(key[1])
    return keys


def _lines(key: str, value: str | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return f"{key}: {value}\n"
    return "".join([f"{key}:\n", *(f"- {one}\n" for one in value)])


def _with_tags(known: str, tags: tuple[str, ...]) -> str:
    """With ``tags`` before those that stand there line by line."""
    found = re.search(r"^tags:[ ]*\n((?:([ ]*- ).*\n)+)", known, re.MULTILINE)
    if found is None:
        return known
    there = {line.strip().removeprefix("-").strip(" '\"") for line in found[1].splitlines()}
    new = "".join(f"{found[2]}{tag}\n" for tag in tags if tag not in there)
    return known[: found.start(1)] + new + known[found.start(1) :]

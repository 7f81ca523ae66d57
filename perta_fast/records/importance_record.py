"""The metadata of an importance, as data for a report."""

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from perta_fast.data.chat import Told
from perta_fast.errors import InputError


class ImportanceRecord(TypedDict):
    """The fields of ``importance.store.ImportanceMetadata``, with the names in a list; older reports lack the last.

    read_as is not there: a report has it beside the data.
    """

    estimator: str
    data_hash: str
    sample_count: int
    truncated_count: int
    label_count: int
    evaluated_at: str
    perta_fast_version: str
    torch_version: str
    transformers_version: str
    one_by_one: list[str]
    rows_hash: NotRequired[str]
    weights_hash: NotRequired[str]
    dtype: NotRequired[str]
    combined: NotRequired[str]
    chat_template: NotRequired[bool]
    system_prompt: NotRequired[str | None]
    date_string: NotRequired[str | None]
    date: NotRequired[str | None]


def importance_record(metadata: Mapping[str, str]) -> ImportanceRecord:
    """The metadata of safetensors files, which are texts, as data. Raises InputError naming what is not a number."""
    told = Told.read(metadata)
    return ImportanceRecord(
        estimator=metadata.get("estimator", ""),
        data_hash=metadata.get("data_hash", ""),
        sample_count=_count(metadata, "sample_count"),
        truncated_count=_count(metadata, "truncated_count"),
        label_count=_count(metadata, "label_count"),
        evaluated_at=metadata.get("evaluated_at", ""),
        perta_fast_version=metadata.get("perta_fast_version", ""),
        torch_version=metadata.get("torch_version", ""),
        transformers_version=metadata.get("transformers_version", ""),
        one_by_one=[name for name in metadata.get("one_by_one", "").split(", ") if name],
        rows_hash=metadata.get("rows_hash", ""),
        weights_hash=metadata.get("weights_hash", ""),
        dtype=metadata.get("dtype", ""),
        combined=metadata.get("combined", ""),
        chat_template=told.chat_template,
        system_prompt=told.system_prompt,
        date_string=told.date_string,
        date=told.date,
    )


def _count(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InputError(f"{key} is {text[:20]!r}, not a whole number")
    return int(text)

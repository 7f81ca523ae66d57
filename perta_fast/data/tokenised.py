"""Data that is tokenised already, as for a Trainer: rows of a data set, or padded batches of a loader."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perta_fast.data.samples import Sample
from perta_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Fields that change what a model computes: packed samples, images, tokens given as vectors.
_REFUSED = ("position_ids", "inputs_embeds", "pixel_values")


def is_tokenised(row: Any) -> bool:
    """Whether a row is tokens instead of text."""
    return isinstance(row, Mapping) and "input_ids" in row


def samples_from(rows: Iterable[Any]) -> list[Sample]:
    """The samples of rows (T,), or of batches (N, T), as ``estimate_importance`` describes them.

    Raises InputError, naming the row, if fields are not whole numbers, differ in shape, or have padding inside a
    sample; or if there is no row.
    """
    import torch

    samples = []
    for number, row in enumerate(rows):
        if not is_tokenised(row):
            raise InputError(f'row {number}: has no "input_ids", which the first row has')
        if refused := [key for key in _REFUSED if row.get(key) is not None]:
            raise InputError(f'row {number}: has "{refused[0]}"; give each sample a row of its own, of "input_ids"')
        ids = _numbers(row, "input_ids", number)
        columns = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        for key in ("labels", "attention_mask"):
            if row.get(key) is not None:
                columns[key] = _numbers(row, key, number)
                if columns[key].shape != ids.shape:
                    raise InputError(
                        f'row {number}: "{key}" has shape {tuple(columns[key].shape)}, "input_ids" has '
                        f"{tuple(ids.shape)}; they must be the same"
                    )
        for k, fields in enumerate(zip(*map(torch.atleast_2d, columns.values()), strict=True)):
            where = f"row {number}" if ids.dim() == 1 else f"batch {number}, row {k}"
            samples.append(_sample(fields, where))
    if not samples:
        raise InputError("there are no samples")
    return samples


def _numbers(row: Mapping[str, Any], key: str, number: int) -> "Tensor":
    import torch

    try:
        value = torch.as_tensor(row[key])
    except (TypeError, ValueError, RuntimeError) as error:  # text, or rows of different lengths
        raise InputError(f'row {number}: "{key}" is not an array of numbers: {error}') from error
    if value.is_floating_point() or value.is_complex() or value.dim() not in (1, 2):
        raise InputError(
            f'row {number}: "{key}" is {value.dtype} of shape {tuple(value.shape)}; '
            "it must be whole numbers, of shape (T,) or (N, T)"
        )
    return value.cpu()


def _sample(fields: Sequence["Tensor"], where: str) -> Sample:
    ids, labels, mask = (field.tolist() for field in fields)
    begin = mask.index(1) if 1 in mask else 0
    end = begin + sum(mask)
    if mask != [0] * begin + [1] * (end - begin) + [0] * (len(mask) - end):
        raise InputError(
            f'{where}: "attention_mask" must be 1 on one run of tokens and 0 on padding before or after it'
        )
    return Sample(tuple(ids[begin:end]), tuple(labels[begin:end]))

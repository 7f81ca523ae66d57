"""Writes docs/families.md from a run of the matrix: ``python -m tests.families.table``."""

import tempfile
from pathlib import Path

import torch

from tests.families.configs import FAMILIES
from tests.families.matrix import Row, measure

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_HEAD = """# Model families

Small random models of each family, run by `python -m tests.families.table`, which wrote this page. Both
estimators are taken in memory and streamed, on data with and without padding. The last column is the largest
norm of a difference between the two, beside the norm of the tensor, over all tensors, estimators and data; 0 is
the same bits. Where sums are taken in another order (tied matrices, experts), they differ by rounding. The test
suite holds the importance in memory to plain autograd in float64, and unlearns each family in both ways.

Other families work if transformers can build them as a causal language model; streaming refuses by name a model
whose layers are no plain chain. Of a multimodal checkpoint (tested: Gemma 3, LLaVA, Qwen2-VL) an importance
covers the language part, on text alone, and the rest is copied byte for byte. Rule `tv` takes no importance:
it subtracts wherever the task vector is not zero.

| family | class in transformers | tied | in memory | streamed | largest difference |
|---|---|---|---|---|---|
"""


def _line(row: Row) -> str:
    tied = "no" if row.tied is None else "yes"
    largest = f"{row.largest:.0e}" if row.largest else "0"
    return f"| {row.family.name} | {type(row.model).__name__} | {tied} | yes | yes | {largest} |\n"


def main() -> None:
    """Run every family; one that fails ends the run, so that the page never promises it."""
    torch.set_num_threads(1)
    lines = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(_line(measure(family, Path(folder))))
    PAGE.write_text(_HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A user's typed program against the annotations of the public functions, by mypy."""

import os
import sys
from pathlib import Path

from tests.support.children import run_child

ROOT = Path(__file__).parent.parent
# What --strict adds to the settings of the project, with which the cache of `make lint` can be used.
STRICT = (
    "disallow-any-generics, disallow-subclassing-any, disallow-untyped-calls, disallow-untyped-defs, "
    "disallow-incomplete-defs, disallow-untyped-decorators, no-implicit-reexport, strict-equality, "
    "warn-return-any, warn-unused-ignores, extra-checks"
)
PROGRAM = """\
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import perta_fast as pf


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([1, 2])}


def show(event: pf.Event) -> None:
    print(event.phase.upper(), event.done / max(1, event.total), event.unit == "step")


report: pf.Report = pf.unlearn("m", "b", Path("t"), "f", "r", rule="fisher", lam=1.0, out="o", progress=show)
change: float | None = report.tensors[0].relative_change
module = torch.nn.Linear(1, 1)
forget: pf.Importance = pf.estimate_importance("b", Rows(), "grad", progress=show)
retain = pf.estimate_importance(module, DataLoader(Rows(), batch_size=2), "empirical-fisher")
records = pf.estimate_importance(module, [{"text": "words"}], progress=False)
kept: dict[str, torch.Tensor] = dict(forget.tensors)
pf.apply("m", "b", "t", forget, "importance/retain", in_place=True)
pf.unlearn("m", "b", "t", [{"text": "words"}], Rows(), rule="tv", at="model", lam=1.0, out="o")
pf.choose("m", "b", "t", Rows(), Path("r"), rules=["preconditioned", "tv"], metric="Q_A_Prob", out="o")
changed: int = pf.apply_to_module_(module, "b", "t", forget, retain)
loss: float = pf.sweep("m", "b", "t", "f", "r", lams=[1, 2], progress=show).rows[0].retain_loss
score: float = pf.evaluate("m", forget="f")["extraction_strength"]
problems: list[str] = pf.verify("o").problems
theta: torch.Tensor = pf.ops.rescaled_subtract_(torch.ones(2), torch.ones(2), torch.ones(2), lam=1.0)
"""


def errors(program: str, folder: Path) -> list[str]:
    """What mypy says of ``program``, by line."""
    path = folder / "program.py"
    path.write_text(f"# mypy: {STRICT}\n{program}", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--hide-error-context", path]
    done = run_child(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)})
    assert done.returncode in (0, 1), done.stderr
    lines = [line.removeprefix(f"{path}:") for line in done.stdout.splitlines() if line.startswith(str(path))]
    return [line for line in lines if ": error:" in line]


def test_a_typed_program(tmp_path: Path) -> None:
    assert errors(PROGRAM, tmp_path) == []


def test_a_wrong_program(tmp_path: Path) -> None:
    found = errors(
        "import perta_fast as pf\n"
        'pf.apply("m", "b", "t", lamb=1.0)\n'
        'pf.unlearn("m", "b", "t", progress=lambda event: event.percent)\n'
        'number: int = pf.estimate_importance("m", 3)\n'
        'pf.unlearn("m", "b", "t", rule="fischer")\n'
        'pf.apply("m", "b", "t", rule="preconditioned")\n'
        'pf.sweep("m", "b", "t", "f", "r", rule=["tv", "tvv"], lams=[1])\n'
        'pf.sweep("m", "b", "t", "f", "r", at="tuned", metric="los", select="best", lams=[1])\n'
        'pf.choose("m", "b", "t", 3, "r", out="o")\n'
        'pf.estimate_importance("m", "f", "gradient")\n',
        tmp_path,
    )
    assert [line.split(":")[0] for line in found] == ["3", "4", "5", "5", "6", "7", "8", "9", "9", "9", "10", "11"]

"""``perta`` under torchrun: what each process does, says and leaves."""

import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import Importance, InputError, apply, cli, resume, unlearn
from perta_fast.cli.main import COMMANDS
from perta_fast.cli.parser import whole_parser
from perta_fast.subtraction import parts
from tests.distributed.launch import Ended, perta_on_ranks
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.children import run_child
from tests.support.models import Job

ROOT = Path(__file__).parents[2]


def unlearning(job: Job, out: Path, *more: object) -> list[object]:
    places = ("--model", job.model, "--base", job.base, "--tuned", job.tuned)
    data = ("--forget", job.forget, "--retain", job.retain)
    return ["unlearn", "--rule=fisher", *places, *data, "--lam", "1", "--out", out, *more]


def near(found: Importance, expected: Importance) -> bool:
    pairs = [(found.tensors[name].double(), expected.tensors[name].double()) for name in expected.tensors]
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in pairs)  # the model computes in bfloat16


@pytest.mark.usefixtures("one_thread")
def test_unlearn(job: Job, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    first, second = perta_on_ranks(2, *unlearning(job, out, "--save-importance", kept, "--batch-size", 1))
    assert first.status == second.status == 0
    assert f"written to {out}" in first.output
    assert second.output == ""
    assert "perta" not in second.errors  # though the bars of transformers are
    unlearn(
        *job.checkpoints,
        job.forget,
        job.retain,
        out=tmp_path / "alone",
        save_importance=tmp_path / "alone-kept",
        batch_size=1,
        progress=False,
        lam=1.0,
        rule="fisher",
    )
    for role in ("forget", "retain"):
        assert near(Importance.load(kept / role), Importance.load(tmp_path / "alone-kept" / role))
    # From the same importances, one process makes the same bytes.
    apply(*job.checkpoints, kept / "forget", kept / "retain", out=tmp_path / "again", progress=False)
    weights, again = (read_checkpoint(folder) for folder in (out, tmp_path / "again"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "kept", "alone", "alone-kept", "again"}


def test_the_lines_in_the_documentation() -> None:
    """Every line of docs/scaling.md is one that torchrun and ``perta`` understand."""
    from torch.distributed.run import get_args_parser

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    launches = 0
    for line in lines:
        words = shlex.split(line)
        if "torchrun" in words:
            launched = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
            assert (launched.module, launched.training_script) == (True, "perta_fast")
            words = ["perta", *launched.training_script_args]
            launches += 1
        if words and words[0] == "perta":
            parsed = whole_parser(COMMANDS).parse_args(words[1:])
            assert parsed.command.over_ranks
    assert launches >= 3


def said_once(ended: list[Ended], status: int) -> str:
    """What the first process says, when all end with ``status`` and no other says anything."""
    assert [each.status for each in ended] == [status] * len(ended)
    assert not any(each.output or each.errors for each in ended[1:])
    return ended[0].errors


def test_what_is_wrong_is_said_once(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = fingerprint(job.model)
    for arguments, text in (
        (unlearning(job, out, "--rule", "nothing"), "invalid choice: 'nothing'"),
        (["demo", "--fast"], "is done by one process"),
        ([*unlearning(job, out)[:-2], "--in-place"], "by one process alone"),
        (["resume", out], "there is no unfinished run to resume"),
        (["importance", "--model", job.base, "--data", tmp_path / "none.jsonl", "--out", out], "cannot be read"),
    ):
        assert text in said_once(perta_on_ranks(2, *arguments), 2)
    assert fingerprint(job.model) == before
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["resume", "nowhere"]) == 2
    assert "WORLD_SIZE is set, but other variables of a launch are missing or wrong" in capsys.readouterr().err


def _hide_the_data(rank: int) -> None:
    """Rank 1 is on a machine that lacks the data."""
    if rank == 1:
        from perta_fast.runs import unlearn_inputs as module

        def missing(path: Path, fields: Any) -> Any:
            raise InputError(f"{path}: cannot be read")

        module.read_data = missing


def test_what_one_lacks_ends_all(job: Job, tmp_path: Path) -> None:
    ended = perta_on_ranks(2, *unlearning(job, tmp_path / "out"), setup=_hide_the_data)
    assert f"perta: error: rank 1: {job.forget}: cannot be read" in said_once(ended, 2)
    assert list(tmp_path.iterdir()) == []


_DYING = """
import os, signal, sys
from perta_fast import cli
from perta_fast.subtraction import parts

original = parts.Part.note

def dying(part, totals):
    original(part, totals)
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

parts.Part.note = dying
sys.exit(cli.main(sys.argv[1:]))
"""


def subtracting(job: Job, out: Path) -> list[object]:
    places = ("--model", job.model, "--base", job.base, "--tuned", job.tuned)
    return ["apply", *places, "--rule", "tv", "--lam", "1", "--out", out]


def finished_by_one(job: Job, out: Path) -> bool:
    """Whether one process makes of what is left what it makes of nothing."""
    resume(out, progress=False)
    alone = out.with_name("alone")
    apply(*job.checkpoints, rule="tv", out=alone, progress=False)
    weights, expected = (read_checkpoint(folder) for folder in (out, alone))
    return all(torch.equal(weights[name], expected[name]) for name in expected)


def test_torchrun(job: Job, tmp_path: Path) -> None:
    """The first process is killed with something done; another one says how to go on."""
    out, script = tmp_path / "out", tmp_path / "dying.py"
    script.write_text(_DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command = [*map(str, [*launch, *subtracting(job, out)])]
    ended = run_child(command, cwd=ROOT)
    assert ended.returncode == 1
    assert not out.exists()
    assert ended.stderr.count(f"perta resume {out}") == 1
    assert ended.stderr.count("perta: ") == 1
    assert finished_by_one(job, out)


def _interrupted(rank: int) -> None:
    original = parts.Part.note

    def interrupted(part: parts.Part, totals: parts.Totals) -> None:
        original(part, totals)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    parts.Part.note = interrupted  # type: ignore[method-assign]


def test_an_interrupt_is_told_once(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = perta_on_ranks(2, *subtracting(job, out), setup=_interrupted)
    assert sorted(each.status for each in ended) == [1, 130]
    assert "".join(each.errors for each in ended).count(f"perta resume {out}") == 1
    assert finished_by_one(job, out)

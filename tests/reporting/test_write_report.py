"""``write_report``: from Python what ``perta report`` does, also of a run on rows given in Python."""

from pathlib import Path

import pytest

import perta_fast as pf
from perta_fast.cli import main
from tests.support.models import FORGET, RETAIN, Job

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_page_of_the_command(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pf.unlearn(*job.checkpoints, FORGET, RETAIN, rule="tv", lam=1.0, out=run, progress=False)
    pf.write_report(run, out=tmp_path / "python.html", verify=False, progress=False)
    command = ["report", run, "--out", tmp_path / "command.html", "--no-verify", "--quiet"]
    assert main([*map(str, command)]) == 0
    page = (tmp_path / "python.html").read_bytes()
    assert page == (tmp_path / "command.html").read_bytes()
    assert b"rows given in Python" in page


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(pf.InputError, match="is this the output of a run"):
        pf.write_report(tmp_path, tmp_path / "page.html")

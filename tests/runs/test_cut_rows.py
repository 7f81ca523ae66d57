"""Rows that are cut to the length limit are counted and warned of by every rule, wherever they are tokenised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import Report, estimate_importance, unlearn
from perta_fast.runs import checked_rows, strength
from tests.support.models import FORGET, RETAIN, Job, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

CUT = {"forget": 3, "retain": 2}  # by a limit between the lengths of the rows of ``FORGET``, and those of ``RETAIN``
LIMIT = 40
WARNINGS = ["3 of 5 forget samples were cut to the length limit", "2 of 6 retain samples were cut to the length limit"]
WAYS: dict[str, dict[str, Any]] = {
    "search and check": {},
    "search": {"check": False},
    "check": {"lam": 1.0},
    "check in place": {"lam": 1.0, "in_place": True},
}


@pytest.fixture
def long(tmp_path: Path) -> Job:
    """A job with some rows that are longer than ``LIMIT``."""
    job = write_job(tmp_path / "job", torch.float32)
    write_lines(job.forget, FORGET[:3] + RETAIN[:2])
    write_lines(job.retain, RETAIN[2:6] + FORGET[3:])
    return job


def run(job: Job, out: Path, **settings: Any) -> Report:
    place = None if settings.get("in_place") else out
    given = {"forget": job.forget, "retain": job.retain, "out": place, "max_length": LIMIT} | settings
    return unlearn(*job.checkpoints, progress=False, **given)


def cut(report: Report) -> dict[str, int]:
    return {role: record["truncated"] for role, record in report.data.items()}


def warnings(report: Report) -> list[str]:
    return [warning for warning in report.warnings if "cut to" in warning]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["preconditioned", "tv", "fisher"])
def test_they_are_on_record(rule: str, way: str, long: Job, tmp_path: Path) -> None:
    report = run(long, tmp_path / "out", rule=rule, **WAYS[way])
    assert cut(report) == CUT
    assert sorted(warnings(report)) == sorted(WARNINGS)


def test_the_context_is_a_limit_too(long: Job, tmp_path: Path) -> None:
    short = write_job(tmp_path / "short", torch.float32, max_position_embeddings=LIMIT)
    job = replace(short, forget=long.forget, retain=long.retain)
    assert cut(run(job, tmp_path / "out", rule="tv", max_length=None)) == CUT


@pytest.mark.parametrize("way", ["search", "check"])
def test_those_to_retain_beside_a_whole_importance(way: str, long: Job, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", FORGET + RETAIN)
    whole = estimate_importance(long.base, rows, out=tmp_path / "whole", max_length=LIMIT, progress=False)
    report = run(long, tmp_path / "out", rule="fisher", whole_importance=whole, **WAYS[way])
    assert (cut(report), warnings(report)) == (CUT, WARNINGS)


@pytest.mark.parametrize("way", ["search", "check"])
def test_some_of_many_rows(way: str, long: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        strength if way == "search" else checked_rows, "ROWS", 3
    )  # all long ones of a file are among them
    write_lines(long.forget, [FORGET[k // 2] if k % 2 == 0 else RETAIN[k // 2] for k in range(6)])
    report = run(long, tmp_path / "out", rule="tv", **WAYS[way])
    assert report.data["forget"].items() >= {"samples": 6, "tokenised": 3, "truncated": 3}.items()
    assert warnings(report)[0] == "3 of the 3 forget samples that were tokenised were cut to the length limit"
    assert Report.load(tmp_path / "out").data == report.data


@pytest.mark.parametrize("how", [{"check": False}, {"stream": True}])
def test_what_is_not_tokenised_is_not_cut(how: dict[str, bool], long: Job, tmp_path: Path) -> None:
    report = run(long, tmp_path / "tv", rule="tv", lam=1.0, **how)
    assert (cut(report), warnings(report)) == ({"forget": 0, "retain": 0}, [])
    report = run(long, tmp_path / "out", lam=1.0, **how)
    assert (cut(report), warnings(report)) == (CUT | {"forget": 0}, WARNINGS[1:])

"""Streamed sweeps: the numbers of the live one, bit for bit, on the CPU in float32."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import Sweep, estimate_importance, sweep
from perta_fast.rules import ESTIMATORS
from perta_fast.scoring.setting import ScoredSetting
from tests.support.models import Job, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16 = torch.float32, torch.bfloat16


def run(job: Job, **chosen: Any) -> Sweep:
    return sweep(*job.checkpoints, job.forget, job.retain, **{"batch_size": 3, "progress": False} | chosen)


def both(job: Job, folder: Path, **chosen: Any) -> tuple[Sweep, Sweep]:
    """The live sweep, and the streamed one."""
    return run(job, **chosen, out=folder / "live"), run(job, **chosen, stream=True, out=folder / "streamed")


def plain(row: ScoredSetting) -> ScoredSetting:
    """What both sweeps must agree on."""
    return replace(row, seconds=0.0, scores={})


def given(job: Job, folder: Path) -> dict[str, list[Path]]:
    """Importances of both estimators."""
    made: dict[str, list[Path]] = {"forget_importance": [], "retain_importance": []}
    for estimator in ESTIMATORS:
        for name, data in zip(made, (job.forget, job.retain), strict=True):
            out = folder / f"{name} {estimator}"
            estimate_importance(job.base, data, estimator, out=out, progress=False)
            made[name].append(out)
    return made


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    made: dict[str, Job] = {}

    def job_of(dtype: torch.dtype, **changes: Any) -> Job:
        key = f"{dtype}{changes}"
        if key not in made:
            made[key] = write_job(tmp_path_factory.mktemp("job"), dtype, **changes)
        return made[key]

    return job_of


CASES: dict[str, dict[str, Any]] = {
    "tv": {"rule": "tv"},
    "rules": {"rule": ["tv", "fisher", "empirical-fisher"], "alpha": [1, 4]},
    "at model": {"rule": ["grad"], "p": [0.5, 2], "threshold": 0.2, "at": "model"},
    "preconditioned": {"mu": [1, 10]},
    "left": {"rule": ["tv", "fisher"], "leave": "embeddings,norms"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_numbers_of_the_live_sweep(case: str, tied: bool, jobs: Callable[..., Job], tmp_path: Path) -> None:
    job, chosen = jobs(F32, tie_word_embeddings=tied), CASES[case]
    if tied and case == "rules":  # gradients of a tied head are added up in another order
        chosen = chosen | given(job, tmp_path)
    live, streamed = both(job, tmp_path, lams=[2, -1, 0.5], metric="extraction_strength", **chosen)
    assert list(map(plain, streamed.rows)) == list(map(plain, live.rows))
    assert len({row.retain_loss for row in streamed.rows}) == len(streamed.rows)

"""Options, conditions, shared inputs and the closing tables of the benchmarks.

Run from the repository: ``python -m pytest bench`` or ``python -m pytest bench/bench_apply.py``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.conditions import conditions, threads
from bench.harness.contest import NO_TIME
from bench.harness.tables import Row, groups, table
from bench.inputs.checkpoints import CheckpointSet, write_checkpoint_set

BOARD = pytest.StashKey[list[Row]]()
CONDITIONS = pytest.StashKey[dict[str, str]]()
OPTIONS: tuple[tuple[str, str, type, str], ...] = (
    ("params", "500_000_000", int, "parameters of the file benchmarks' checkpoints"),
    ("importance", "bfloat16", str, "type of the importances in files: bfloat16 or float32"),
    ("elements", "64_000_000", int, "elements of the in-memory benchmarks' arrays"),
    ("rounds", "5", int, "measured rounds of every contender"),
    ("device", "cpu", str, "cpu or cuda, for the in-memory benchmarks"),
    ("dir", "", str, "where the checkpoints are made (default: the temporary directory)"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options --bench-NAME; each default can be set by an environment variable PERTA_BENCH_NAME."""
    group = parser.getgroup("perta_fast benchmarks")
    for name, default, kind, text in OPTIONS:
        value = os.environ.get(f"PERTA_BENCH_{name.upper()}", default)
        group.addoption(f"--bench-{name}", type=kind, default=kind(value), help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Note the conditions before anything is measured."""
    torch.set_num_threads(threads())
    config.stash[BOARD] = []
    noted = conditions(config.getoption("--bench-device"))
    for name in ("params", "elements", "rounds"):
        noted[name] = f"{config.getoption(f'--bench-{name}'):,}"
    if "PERTA_BENCH_DEADLINE" in os.environ:
        noted["rounds"] = f"at most {noted['rounds']}, as far as the time went"
    noted["importances in files"] = config.getoption("--bench-importance")
    cold = os.environ.get("PERTA_BENCH_COLD") == "1"
    noted["input files"] = "evicted before every run" if cold else "in the page cache"
    config.stash[CONDITIONS] = noted


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Print the conditions once."""
    return [f"{name}: {value}" for name, value in config.stash[CONDITIONS].items()]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    """Publish the conditions instead of pytest-benchmark's machine info, which names the host."""
    return config.stash[CONDITIONS]


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    """Results are tied to versions, not to commits."""
    return {}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print one table for each group."""
    board = config.stash[BOARD]
    for group, rows in groups(board).items():
        terminalreporter.section(group)
        for line in table(rows):
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Exit as the command ``timeout`` does (124) if some contender could not be measured before the deadline."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and any(NO_TIME in str(report.longrepr) for report in reporter.stats.get("skipped", [])):
        session.exitstatus = 124


@pytest.fixture(scope="session")
def board(pytestconfig: pytest.Config) -> list[Row]:
    """The rows for the closing tables."""
    return pytestconfig.stash[BOARD]


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """The number of measured rounds of every contender."""
    return int(pytestconfig.getoption("--bench-rounds"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where the in-memory benchmarks run."""
    return str(pytestconfig.getoption("--bench-device"))


@pytest.fixture(scope="session")
def elements(pytestconfig: pytest.Config) -> int:
    """The length of the in-memory benchmarks' arrays."""
    return int(pytestconfig.getoption("--bench-elements"))


@pytest.fixture(scope="session")
def workspace(pytestconfig: pytest.Config) -> Iterator[Path]:
    """A new directory on the disk that the file benchmarks use; it is removed at the end."""
    parent = pytestconfig.getoption("--bench-dir") or None
    folder = Path(tempfile.mkdtemp(prefix="perta-bench-", dir=parent))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoints(pytestconfig: pytest.Config, workspace: Path) -> CheckpointSet:
    """Model, base, tuned and importances of about --bench-params parameters."""
    return write_checkpoint_set(
        workspace / "inputs",
        pytestconfig.getoption("--bench-params"),
        getattr(torch, pytestconfig.getoption("--bench-importance")),
    )

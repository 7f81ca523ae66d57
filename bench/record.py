"""Write RESULTS.md from pytest-benchmark's JSON: ``python -m bench.record RUN.json ...``.

The measurements are in results.json, one entry for each group. A new run of a group replaces the old one; other
groups stay. Without arguments, only RESULTS.md is written again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.bench_adapter import CONTENDERS as ADAPTER
from bench.bench_adapter import PHASE as ADAPTER_PHASE
from bench.bench_adapter import WHOLE as ADAPTER_WHOLE
from bench.bench_answers import ANSWERS
from bench.bench_answers import CONTENDERS as ANSWERING
from bench.bench_apply import APPLY_PHASE, BESIDE, BUILDS, PHASE, WHOLE, WHOLE_PROCESS
from bench.bench_check import CONTENDERS as CHECK
from bench.bench_check import GROUP as CHECKS
from bench.bench_choose import CHOICE
from bench.bench_choose import CONTENDERS as CHOOSING
from bench.bench_crowded import CROWDED
from bench.bench_crowded import group_of as crowded_roles
from bench.bench_eval import CONTENDERS as EVALUATION
from bench.bench_fisher import MODEL, OPERATION
from bench.bench_hash import CONTENDERS as HASHING
from bench.bench_hash import GROUP as HASHES
from bench.bench_importance import GROUP
from bench.bench_ranks import OVER_PROCESSES, RANK_ROLES
from bench.bench_reading import WAYS
from bench.bench_requests import CONTENDERS as REQUEST
from bench.bench_requests import GROUP as REQUESTS
from bench.bench_running_type import CONTENDERS as RUNNING_TYPE
from bench.bench_running_type import GROUP as RUNNING_TYPES
from bench.bench_stream import AGAINST, BEYOND, DEPTH, LARGE, stream_roles
from bench.bench_sweep import BUILDS as SWEEP_BUILDS
from bench.bench_sweep import BUILDS_GROUP as SWEEPS_BESIDE
from bench.bench_sweep import CONTENDERS as SWEEP
from bench.bench_sweep import GROUP as SWEEPS
from bench.bench_tokenise import CONTENDERS as TOKENISING
from bench.harness.tables import MISSING, Row, groups, table
from bench.inputs.arrays import roles
from bench.inputs.importance_job import ROLES

FOLDER = Path(__file__).resolve().parent
STORE = FOLDER / "results.json"
RESULTS = FOLDER / "RESULTS.md"

PLANNED = {  # the beginning of a group's name, and the heading of its table
    WHOLE: "Whole commands",
    PHASE: "Whole commands",
    ADAPTER_WHOLE: "An adapter for a checkpoint",
    ADAPTER_PHASE: "An adapter for a checkpoint",
    "reading": "Reading the inputs",
    HASHES: "Hashing",
    GROUP: "Importance",
    OVER_PROCESSES: "Importance",
    DEPTH: "Streaming",
    AGAINST: "Streaming",
    BEYOND: "Streaming",
    LARGE: "Streaming",
    SWEEPS: "Sweeps",
    CHOICE: "Sweeps",
    REQUESTS: "Deletion requests",
    CHECKS: "The check of an unlearning",
    ANSWERS: "Help and refusals",
    CROWDED: "On a crowded machine",
    RUNNING_TYPES: "The type that a model runs in",
    "tokenising": "Tokenising",
    "evaluation, cpu": "Evaluation",
    "evaluation, cuda": "Evaluation on a GPU",
    "fisher, cpu": "Per-sample Fisher of a linear map",
    "fisher of a model, cpu": "Per-sample Fisher of a whole model",
    "fisher, cuda": "Per-sample Fisher of a linear map on a GPU",
    "fisher of a model, cuda": "Per-sample Fisher of a whole model on a GPU",
    "subtract, cpu": "Rescaled subtraction in memory",
    "subtract, cuda": "Rescaled subtraction on a GPU",
    "accumulate, cpu": "Accumulating gradients in memory",
    "accumulate, cuda": "Accumulating gradients on a GPU",
}
PREAMBLE = """\
# Benchmark results

Written by `python -m bench.record`; do not edit. Times are medians over rounds in which every
contender of a table ran once, in rotating order; "time / ours" is the median of the ratios within
rounds. GB/s (10⁹ bytes) count each byte once; "of limit" compares them with the fastest limit of
the table. How to run: `python -m pytest bench --benchmark-json=run.json`, then
`python -m bench.record run.json`; on a machine with an NVIDIA GPU, `bench/gpu.sh`.
"""

Store = dict[str, dict[str, Any]]


def load() -> Store:
    """Read the measurements recorded so far."""
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def expected(group: str) -> dict[str, str]:
    """Contenders and roles that a complete run of ``group`` has."""
    if group == SWEEPS_BESIDE:
        return SWEEP_BUILDS
    if BESIDE in group:
        return BUILDS
    if group.startswith((WHOLE, PHASE)):
        return WHOLE_PROCESS if group.startswith(WHOLE) else APPLY_PHASE
    if group in (ADAPTER_WHOLE, ADAPTER_PHASE):
        return ADAPTER
    if group in (DEPTH, AGAINST, BEYOND, LARGE):
        return stream_roles(group)
    if group == GROUP:
        return ROLES
    if group == HASHES:
        return HASHING
    if group == SWEEPS:
        return SWEEP
    if group == CHOICE:
        return CHOOSING
    if group == REQUESTS:
        return REQUEST
    if group.startswith(CHECKS):
        return CHECK
    if group.startswith(ANSWERS):
        return ANSWERING
    if group.startswith(CROWDED):
        return crowded_roles(group.removeprefix(f"{CROWDED}: perta "))
    if group.startswith(OVER_PROCESSES):
        return RANK_ROLES
    if group.startswith(RUNNING_TYPES):
        return RUNNING_TYPE
    if group.startswith("tokenising"):
        return TOKENISING
    if group.startswith("evaluation"):
        return EVALUATION
    if group.startswith("reading"):
        return WAYS
    if group.startswith("fisher"):
        return MODEL if group.startswith("fisher of a model") else OPERATION
    return roles("cuda" if ", cuda" in group else "cpu")


def add(store: Store, run: dict[str, Any]) -> None:
    """Add the groups of one pytest-benchmark run to ``store``."""
    rows: list[Row] = [entry["extra_info"] for entry in run["benchmarks"] if entry["extra_info"]]
    for group, members in groups(rows).items():
        if not group.startswith(tuple(PLANNED)):
            raise SystemExit(f"{group}: has no heading in RESULTS.md; add one to PLANNED in bench/record.py")
        measured = {row["contender"] for row in members}
        for contender, role in expected(group).items():
            if contender not in measured:
                members.append({"contender": contender, "role": role, "seconds": []})
        store[group] = {"conditions": run["machine_info"], "rows": members}


def render(store: Store) -> str:
    """The text of RESULTS.md."""
    lines = [PREAMBLE]
    heading = ""
    for prefix, title in PLANNED.items():
        if title != heading:
            lines += [f"## {title}", ""]
            heading = title
        measured = [group for group in store if group.startswith(prefix)]
        if not measured:
            lines += [f"### {prefix}", "", f"{MISSING.capitalize()}.", ""]
        last = ""
        for group in measured:
            conditions = "; ".join(f"{name} {value}" for name, value in store[group]["conditions"].items())
            lines += [f"### {group}", "", *table(store[group]["rows"]), ""]
            if conditions != last:
                lines += [f"Conditions: {conditions}.", ""]
                last = conditions
    return "\n".join(lines).rstrip() + "\n"


def main(paths: list[str]) -> int:
    """Add the runs in ``paths`` to results.json and write RESULTS.md."""
    store = load()
    for path in paths:
        add(store, json.loads(Path(path).read_text()))
    if store:
        STORE.write_text(json.dumps(store, indent=1, ensure_ascii=False) + "\n")
    RESULTS.write_text(render(store))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

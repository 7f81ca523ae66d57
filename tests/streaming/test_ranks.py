"""A streamed run over many ranks gives what one process gives, and can be finished whichever of them dies."""

import errno
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from perta_fast import InputError, Report, estimate_importance, resume, unlearn, verify
from perta_fast.data.rows import read_data
from perta_fast.data.samples import encode
from perta_fast.distributed.ranks import Ranks
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.journal import JOB
from perta_fast.files.new_directory import OutputDirectory, partial_path
from perta_fast.runs import apply as application
from perta_fast.streaming import kept_importance, scratch_files, step_record, write_behind
from perta_fast.streaming.data_pass import DataPass
from perta_fast.streaming.forecast import choice as planning
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.step_record import rank_path
from perta_fast.subtraction.unfinished import STATE, WALK
from tests.distributed.launch import Ended, on_ranks, perta_on_ranks
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.models import FORGET, RETAIN, Job, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SOAK = os.environ.get("PERTA_SOAK") == "1"
KILLS = 200  # in a soak
CHUNK = 500  # elements, so that ranks share a tensor


class Case(NamedTuple):
    """One run: its inputs, and how they are walked."""

    family: str
    rule: str
    schedule: Schedule
    retain: int = len(RETAIN)  # samples, fewer than there are ranks in one case


CASES = [
    Case("Llama", "grad", Schedule(2)),
    Case("Qwen3 tied", "empirical-fisher", Schedule(2, every=2, groups=2)),
    Case("Mixtral", "empirical-fisher", Schedule(3, overlap=False)),
    Case("Mixtral", "fisher", Schedule(2, groups=3), retain=1),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """The inputs of each case."""
    jobs = []
    for case in CASES:
        folder = tmp_path_factory.mktemp("case")
        family = next(each for each in FAMILIES if each.name == case.family)
        checkpoints = [write(build(family, seed), folder / str(seed)) for seed in range(3)]
        data = [
            write_lines(folder / name, rows) for name, rows in (("forget", FORGET), ("retain", RETAIN[: case.retain]))
        ]
        jobs.append(Job(*checkpoints, *data))
    return jobs


def run_all(group: Any, jobs: list[Job], folder: Path) -> list[Report]:
    """Every case, and one importance: on each of the ranks, or in one process."""
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(application, "chunk_elements", lambda threads: CHUNK)
        for number, (case, job) in enumerate(zip(CASES, jobs, strict=True)):
            patch.setattr(planning, "schedule_for", lambda *_, schedule=case.schedule: schedule)
            settings: Any = {"rule": case.rule, "lam": 0.7, "stream": True, "progress": False, "group": group}
            places: Any = {"out": folder / f"{number}", "save_importance": folder / f"{number} kept"}
            reports.append(unlearn(*job.checkpoints, job.forget, job.retain, **{"rule": "fisher"} | settings, **places))
        importance: Any = {"out": folder / "importance", "stream": True, "progress": False, "group": group}
        estimate_importance(jobs[1].base, jobs[1].forget, "empirical-fisher", **importance)
    return reports


@pytest.fixture(scope="module")
def alone(jobs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Report]]:
    """What one process makes of all cases."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)  # a module's fixture comes before one_thread
    reports = run_all(None, jobs, folder)
    torch.set_num_threads(threads)
    return folder, reports


def assert_close(expected: Path, found: Path) -> None:
    tensors, others = read_checkpoint(expected), read_checkpoint(found)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (others[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world: int, jobs: list[Job], alone: tuple[Path, list[Report]], tmp_path: Path) -> None:
    outcomes = on_ranks(world, run_all, jobs, tmp_path)
    assert all(isinstance(reports, list) for reports in outcomes), outcomes
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in alone[0].iterdir()}
    for number, expected in enumerate(alone[1]):
        reports = [reports[number] for reports in outcomes]
        assert_close(alone[0] / f"{number}", tmp_path / f"{number}")
        for role in ("forget", "retain"):
            assert_close(alone[0] / f"{number} kept" / role, tmp_path / f"{number} kept" / role)
        assert all(report.tensors == reports[0].tensors for report in reports)
        for row, other in zip(expected.tensors, reports[0].tensors, strict=True):
            assert (row.name, row.action) == (other.name, other.action)
            assert row.mean_weight == pytest.approx(other.mean_weight, rel=1e-4)
        found = Report.load(tmp_path / f"{number}")
        for key in ("data", "importance", "counts"):
            assert getattr(found, key) == getattr(expected, key)
        assert found.settings == expected.settings | {"processes": world}
    assert_close(alone[0] / "importance", tmp_path / "importance")
    result = verify(tmp_path / "1", full=True, progress=False)
    assert not result.problems and not result.unchecked


# Where a rank goes on, by its own record and those of the others.


def state(done: int, **more: Any) -> dict[str, Any]:
    return {"done": done, "passes": {}, "totals": {}, **more}


def go_on(folder: Path, others: list[int]) -> write_behind.WalkRecord | None:
    class Beside(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, *others]

    return write_behind.resume_walk(OutputDirectory(folder), 9, 0, Beside(0, 1, None))


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (None, [0, 1], None),
        (state(1), [1, 0], None),
        (state(1), [1, 2], state(1)),
        (state(5, before=state(4)), [6, 5], state(5)),
        (state(5, before=state(4)), [5, 4], state(4)),
        (state(5), [6, 5], state(5)),
        (state(5, before=state(4)), [5, 3], InputError),
        (state(5, before=state(4)), [5, 0], InputError),
        (state(5), [5, 4], InputError),
        (state(10), [10], InputError),
        (state(9, before=state(10)), [9], InputError),
    ],
)
def test_where_a_rank_goes_on(own: Any, others: list[int], expected: Any, tmp_path: Path) -> None:
    """What it goes on from is its record then, so that it would do the same after another kill."""
    record = partial_path(tmp_path / "out") / STATE / WALK
    record.parent.mkdir(parents=True)
    if own is not None:
        write_record(record, own)
    if expected is InputError:
        with pytest.raises(InputError):
            go_on(tmp_path / "out", others)
        assert read_record(record) == own
        return
    assert go_on(tmp_path / "out", others) == expected
    assert (read_record(record)["done"] if record.exists() else 0) == (expected["done"] if expected else 0)


# What stops a run. The command, as torchrun starts it, on two ranks.


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"), torch.float32)


def arguments(job: Job, out: Path, *more: object) -> list[object]:
    model, base, tuned = job.checkpoints
    return [
        *("unlearn", "--rule=fisher", "--stream", "--model", model, "--base", base, "--tuned", tuned, "--quiet"),
        *("--forget", job.forget, "--retain", job.retain, "--rule", "empirical-fisher", "--lam", "0.7"),
        *("--batch-size", "2", "--save-importance", out.with_name("kept"), "--out", out, *more),
    ]


def contents(folder: Path) -> dict[str, str]:
    """All that must be the same from run to run: weights, importances, companions."""
    found = fingerprint(folder)
    return {str(path.relative_to(folder)): found[path] for path in found if "perta" not in path.name}


def statuses(outcomes: list[Ended | None]) -> list[int | None]:
    return [each and each.status for each in outcomes]


def said(outcomes: list[Ended | None]) -> str:
    """What all ranks together wrote on standard error: one line."""
    text = "".join(each.errors for each in outcomes if each)
    assert text.count("\n") == 1, text
    return text


def prepared(rank: int) -> None:
    """Tensors are shared, and no time goes into the choice of a schedule."""
    application.chunk_elements = lambda threads: CHUNK
    planning.schedule_for = lambda *_: Schedule(2, groups=2)


def at_calls(watched: int, strike: Callable[[str], None], rank: int) -> None:
    """Have rank ``watched`` call ``strike(name)`` before and after what changes files or meets the others."""
    prepared(rank)
    if rank != watched:
        return

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            strike(f"{name} {arguments[0]}")
            result = original(*arguments, **settings)
            strike(f"{name} {arguments[0]}")
            return result

        setattr(owner, name, call)

    for module in (write_behind, step_record, kept_importance, scratch_files):
        for name in ("write_fully", "write_record", "sync", "sync_tree", "remove"):
            if hasattr(module, name):
                watch(module, name)
    watch(Path, "unlink")
    watch(Ranks, "gather")


def struck(text: str, number: int, then: Callable[[], object], seen: list[str], name: str) -> None:
    """Do ``then`` at the strike of that number, from 1, with ``text`` in its name."""
    if text in name:
        seen.append(name)
        if len(seen) == number:
            then()


def kill(text: str, number: int) -> Callable[[str], None]:
    return partial(struck, text, number, die, [])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def noted(folder: Path, rank: int) -> None:
    """Write down the names of a rank's strikes."""

    def note(name: str) -> None:
        with (folder / f"{rank}").open("a") as file:
            print(name, file=file)

    at_calls(rank, note, rank)


class Whole(NamedTuple):
    """A run that nothing stopped: what it made, and the names of each rank's strikes."""

    made: dict[str, str]
    strikes: list[list[str]]


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, notes = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("notes")
    outcomes = perta_on_ranks(2, *arguments(job, folder / "out"), setup=partial(noted, notes))
    assert statuses(outcomes) == [0, 0]
    return Whole(contents(folder), [(notes / f"{rank}").read_text().splitlines() for rank in range(2)])


def finish(job: Job, out: Path, whole: Whole) -> None:
    """Finish what a run has left, with the command itself if it left nothing."""
    left = (out / STATE).exists() or (partial_path(out) / STATE / JOB).exists()
    if left or not out.exists():
        again = ["resume", "--quiet", out] if left else arguments(job, out)
        outcomes = perta_on_ranks(2, *again, setup=prepared)
        assert statuses(outcomes) == [0, 0], outcomes
    assert contents(out.parent) == whole.made


def recorded(out: Path) -> list[int]:
    """How many steps each rank has recorded."""
    folder = partial_path(out) / STATE
    return [read_record(rank_path(folder, WALK, rank))["done"] for rank in range(2)]


def test_killed_one_step_apart(job: Job, whole: Whole, tmp_path: Path) -> None:
    """The rank that is ahead goes back, and is killed as soon as it has."""
    out = tmp_path / "out"
    steps = sum(WALK in name for name in whole.strikes[1]) // 2
    assert steps == 2 * (2 * 2 + 3)  # one for each part, forward and back, in each group
    ahead = partial(at_calls, 1, kill(WALK, 2 * steps - 3))  # before its last record but one
    outcomes = perta_on_ranks(2, *arguments(job, out), setup=ahead)
    assert statuses(outcomes) == [1, None]
    assert f"torchrun --nproc-per-node 2 -m perta_fast resume {out}" in said(outcomes)
    assert recorded(out) == [steps - 1, steps - 2]
    going_back = partial(at_calls, 0, kill(WALK, 2))
    assert statuses(perta_on_ranks(2, "resume", out, setup=going_back)) == [None, 1]
    assert recorded(out) == [steps - 2, steps - 2]
    finish(job, out, whole)


def test_killed_at_any_call(job: Job, whole: Whole, tmp_path: Path) -> None:
    """Before the first record, and late in the walk; in a soak at calls that are drawn."""
    first = next(number for number, name in enumerate(whole.strikes[0]) if WALK in name)
    kills = [(0, first), (1, len(whole.strikes[1]) * 3 // 4)]
    if SOAK:
        seed = random.randrange(1 << 32)
        print(f"drawn with the seed {seed}")
        drawn = random.Random(seed)
        kills = [(victim, drawn.randrange(len(whole.strikes[victim]))) for victim in [0, 1] * (KILLS // 2)]
    for victim, number in kills:
        out = tmp_path / f"{victim} {number}" / "out"
        setup = partial(at_calls, victim, kill("", number + 1))
        assert perta_on_ranks(2, *arguments(job, out), setup=setup)[victim] is None
        finish(job, out, whole)


def test_stopped_by_the_user(job: Job, whole: Whole, tmp_path: Path) -> None:
    """The same command goes on with as many processes, and no other number can."""
    out = tmp_path / "out"
    outcomes = perta_on_ranks(2, *arguments(job, out), setup=interrupted)
    advice = f"torchrun --nproc-per-node 2 -m perta_fast resume {out}"
    assert statuses(outcomes) == [130, 130]
    assert any(advice in each.errors for each in outcomes)
    outcomes = perta_on_ranks(3, *arguments(job, out), setup=prepared)
    assert statuses(outcomes) == [2, 2, 2]
    assert f"its samples were dealt to 2 processes, this is a run of 3; finish it with: {advice}" in said(outcomes)
    with pytest.raises(InputError, match="this is a run of 1"):
        resume(out, progress=False)
    assert statuses(perta_on_ranks(2, *arguments(job, out), setup=prepared)) == [0, 0]
    assert contents(tmp_path) == whole.made


def interrupted(rank: int) -> None:
    """Ctrl-C reaches all ranks, on the way back."""
    prepared(rank)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background

    def layer(data: DataPass, number: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    DataPass.backward = layer  # type: ignore[method-assign, assignment]


def test_a_full_disk_on_one_rank(job: Job, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    writes = sum(name.startswith("write_fully") for name in whole.strikes[1])
    full = partial(struck, "write_fully", writes - 1, no_space, [])  # before the last
    outcomes = perta_on_ranks(2, *arguments(job, out), setup=partial(at_calls, 1, full))
    assert statuses(outcomes) == [1, 1]
    assert "rank 1: the disk is full" in said(outcomes)
    assert f"Finish the run with: torchrun --nproc-per-node 2 -m perta_fast resume {out}" in said(outcomes)
    finish(job, out, whole)


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_loss_that_is_not_finite_on_one_rank(tmp_path: Path) -> None:
    """The sample is named by its number in all the data, and nothing is left."""
    job = write_job(tmp_path / "job", torch.float32, max_shard_size="1GB")
    write_lines(job.forget, [*FORGET[:4], {"text": "ZZ QQ"}])
    samples = encode([*read_data(job.forget)[0], *read_data(job.retain)[0]], tokenizer(), 128)
    other = {token for number, sample in enumerate(samples) if number != 4 for token in sample.input_ids}
    tensors = load_file(job.base / "model.safetensors")
    tensors["model.embed_tokens.weight"][min(set(samples[4].input_ids) - other)] = float("nan")
    save_file(tensors, job.base / "model.safetensors", {"format": "pt"})
    outcomes = perta_on_ranks(2, *arguments(job, tmp_path / "out"))
    assert statuses(outcomes) == [1, 1]
    assert "sample 4 (counted from 0): what the embedding makes of it" in said(outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_what_a_run_would_take(job: Job, tmp_path: Path) -> None:
    outcomes = perta_on_ranks(2, *arguments(job, tmp_path / "out", "--dry-run"))
    assert statuses(outcomes) == [0, 0]
    assert [each.output.count("for each of 2 processes") for each in outcomes if each] == [1, 0]
    assert list(tmp_path.iterdir()) == []

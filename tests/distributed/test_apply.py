"""``apply`` with the tensors dealt over ranks: the same bytes as one process, whatever stops it on the way."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perta_fast import ImportanceRatio, InputError, Report, apply, resume
from perta_fast.checkpoints.safetensors_file import SafetensorsFile, TensorEntry
from perta_fast.distributed import shared_directory
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import Interrupted, RankLost, RunError
from perta_fast.runs import apply as application
from perta_fast.subtraction import parts, to_directory
from perta_fast.subtraction.matching import TensorMatch
from perta_fast.subtraction.parts import Part, Shard, deal_in_order, remaining_parts
from tests.distributed.launch import on_ranks
from tests.support.checkpoints import fingerprint
from tests.support.inputs import Inputs, write_inputs

CHUNK = 64  # elements, so that these tensors are cut


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Inputs]:
    """Checkpoints of one and of three shards."""
    folder = tmp_path_factory.mktemp("inputs")
    return {shards: write_inputs(folder / str(shards), shards=shards) for shards in (1, 3)}


def weights_of(folder: Path) -> dict[str, str]:
    return {path.name: digest for path, digest in fingerprint(folder).items() if path.suffix == ".safetensors"}


def alone(inputs: Inputs, out: Path) -> dict[str, str]:
    """The weights that one process writes."""
    apply(*inputs.all, rule="grad", lam=1.5, out=out, progress=False)
    return weights_of(out)


def _apply(group: Any, inputs: Inputs, out: Path, stop: Callable[[int], None] | None = None) -> Report:
    application.chunk_elements = lambda threads: CHUNK
    if stop is not None:
        stop(Ranks.of(group).rank)
    return apply(*inputs.all, rule="grad", lam=1.5, out=out, progress=False, group=group)


def _apply_all(group: Any, inputs: dict[int, Inputs], folder: Path) -> list[Report]:
    reports = [_apply(group, each, folder / f"out-{shards}") for shards, each in inputs.items()]
    reports.append(apply(*inputs[3].checkpoints, rule="tv", out=folder / "tv", progress=False, group=group))
    ratio = ImportanceRatio.of(inputs[3]["forget"], inputs[3]["retain"])
    ratio.save(folder / "ratio", group=group)
    how: dict[str, Any] = {"rule": "grad", "lam": 1.5, "progress": False, "group": group}
    reports.append(apply(*inputs[3].checkpoints, importance=ratio, out=folder / "by-ratio", **how))
    return reports


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_bytes_as_one_process(world: int, inputs: dict[int, Inputs], tmp_path: Path) -> None:
    outcomes = on_ranks(world, _apply_all, inputs, tmp_path)
    for shards, report in zip((1, 3), outcomes[0], strict=False):
        out = tmp_path / f"out-{shards}"
        expected = alone(inputs[shards], tmp_path / f"alone-{shards}")
        assert weights_of(out) == expected
        one = Report.load(tmp_path / f"alone-{shards}")
        assert report.inputs == one.inputs
        assert report.output["files"] == one.output["files"]
        assert report.counts == one.counts
        assert [row.changed for row in report.tensors] == [row.changed for row in one.tensors]
        assert [row.mean_weight for row in report.tensors] == pytest.approx([row.mean_weight for row in one.tensors])
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / f"alone-{shards}").iterdir()}
    apply(*inputs[3].checkpoints, rule="tv", out=tmp_path / "tv-alone", progress=False)
    assert weights_of(tmp_path / "tv") == weights_of(tmp_path / "tv-alone")


def _killed_at(rank: int, *, victim: int, place: str, call: int) -> None:
    """Let the victim die at a call of ``Part.note`` or of ``write_fully``."""
    if rank != victim:
        return
    module, name = (parts.Part, "note") if place == "note" else (to_directory, "write_fully")
    original, calls = getattr(module, name), []

    def dying(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(module, name, dying)


def _resume(group: Any, out: Path) -> Report:
    found = resume(out, progress=False, group=group)
    assert isinstance(found, Report)
    return found


@pytest.mark.parametrize(
    ("shards", "victim", "place", "call", "world"),
    [
        (1, 1, "write", 3, 1),  # resumed by one process
        (1, 0, "note", 1, 3),
        (3, 2, "note", 2, 2),
        (3, 0, "write", 9, 4),
    ],
)
def test_a_rank_killed_anywhere(
    shards: int, victim: int, place: str, call: int, world: int, inputs: dict[int, Inputs], tmp_path: Path
) -> None:
    expected = alone(inputs[shards], tmp_path / "alone")
    out = tmp_path / "out"
    stop = partial(_killed_at, victim=victim, place=place, call=call)
    outcomes = on_ranks(3, _apply, inputs[shards], out, stop)
    assert outcomes[victim] is None
    assert not out.exists()
    survivors = [each for each in outcomes if each is not None]
    assert len(survivors) == 2
    for error in survivors:
        assert isinstance(error, RankLost)
        assert "another process of this run died" in str(error)
    if not to_directory.has_begun(out):  # no rank had finished a part: the same command starts again
        assert any("Run the same command again" in str(error) for error in survivors)
        _apply(None, inputs[shards], out)
    elif world == 1:
        assert any(f"perta resume {out}" in str(error) for error in survivors)
        resume(out, progress=False)
    else:
        reports = on_ranks(world, _resume, out)
        assert reports[0].resumed == 1
    assert weights_of(out) == expected


def test_a_companion_that_changed_is_refused_by_all_ranks(
    inputs: dict[int, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is put back, and the ranks finish what one process has begun."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = alone(inputs[3], tmp_path / "alone")
    out, path = tmp_path / "out", inputs[3]["model"] / "tokenizer.json"
    path.write_text("{}")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(to_directory, "describe_output", stop)
        _apply(None, inputs[3], out)
    path.write_text("{ }")
    for error in on_ranks(2, _resume, out):
        assert isinstance(error, InputError)
        assert f"{path}: has changed since the run began" in str(error)
    path.write_text("{}")
    on_ranks(2, _resume, out)
    path.unlink()
    assert weights_of(out) == expected


def _disk_full(rank: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        to_directory.write_fully = full


def test_a_disk_that_is_full_for_one_rank_ends_all(inputs: dict[int, Inputs], tmp_path: Path) -> None:
    first, second = on_ranks(2, _apply, inputs[3], tmp_path / "out", _disk_full)
    assert isinstance(first, RunError)
    assert "rank 1: the disk is full" in str(first)
    assert isinstance(second, OSError)
    assert not (tmp_path / "out").exists()


def _refused(group: Any, inputs: Inputs, folder: Path) -> list[BaseException]:
    ranks = Ranks.of(group)
    shared_directory._TIMEOUT = 0.3
    (folder / str(ranks.rank)).mkdir()

    def unseen() -> None:
        shared_directory.check_shared(folder / str(ranks.rank), ranks)

    def in_place() -> None:
        apply(*inputs.all, rule="grad", in_place=True, progress=False, group=group)

    def one_bad_argument() -> None:
        apply(
            *inputs.all,
            rule="grad",
            lam=1.0 + ranks.rank * float("inf"),
            out=folder / "out",
            progress=False,
            group=group,
        )

    errors = []
    for refused in (unseen, in_place, one_bad_argument):
        with pytest.raises(InputError) as caught:
            refused()
        errors.append(caught.value)
    return errors


def test_refusals(inputs: dict[int, Inputs], tmp_path: Path) -> None:
    before = fingerprint(inputs[1].folder)
    for unseen, in_place, bad_argument in on_ranks(2, _refused, inputs[1], tmp_path):
        assert "is not seen by all processes" in str(unseen)
        assert "one process alone" in str(in_place)
        assert "lam" in str(bad_argument)
    assert fingerprint(inputs[1].folder) == before
    assert not (tmp_path / "out").exists()


# How it is dealt.


def shard(counts: list[int], chunk: int) -> Shard:
    plans = {}
    for k, count in enumerate(counts):
        entry = TensorEntry(f"t{k}", "F32", (count,), 0, 4 * count, Path("x"))
        plans[k] = TensorMatch(entry, base=entry, tuned=entry)
    source = SafetensorsFile(Path("x"), 0, b"", {match.theta.name: match.theta for match in plans.values()}, {}, 0)
    return Shard(source, Path("x"), Path("state"), plans, chunk)


SHARDS = st.lists(st.lists(st.integers(0, 50), max_size=5), min_size=1, max_size=5)


def numbers(part: Part) -> list[tuple[int, int]]:
    return [(id(part.shard), number) for number in range(part.begin, part.end)]


@given(SHARDS, st.integers(1, 9), st.integers(1, 6))
def test_every_chunk_is_dealt_once_in_order_and_evenly(counts: list[list[int]], chunk: int, hands: int) -> None:
    whole = [part for each in counts for part in remaining_parts(shard(each, chunk), [])]
    dealt = deal_in_order(whole, hands)
    assert [n for hand in dealt for part in hand for n in numbers(part)] == [n for part in whole for n in numbers(part)]
    assert {part.shard for hand in dealt for part in hand} == {part.shard for part in whole}  # empty files too
    costs = [sum(part.cost for part in hand) for hand in dealt]
    largest = max((part.shard.cost(n, n + 1) for part in whole for n in range(part.end)), default=0)
    assert max(costs) <= sum(costs) / hands + largest
    for hand in dealt:
        for part in hand:
            elements = [(c.index, c.begin + k) for c in part.chunks() for k in range(c.count)]
            assert len(elements) == len(set(elements))
            assert 16 * len(elements) == part.cost  # theta is read and written, base and tuned are read


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 9), st.data())
def test_what_is_left_is_what_is_not_done(counts: list[int], chunk: int, data: st.DataObject) -> None:
    one = shard(counts, chunk)
    places = sorted(data.draw(st.sets(st.integers(0, one.count), max_size=6)))
    done = list(zip(places[::2], places[1::2], strict=False))
    covered = {n for begin, end in done for n in range(begin, end)}
    left = [n for part in remaining_parts(one, done) for n in range(part.begin, part.end)]
    assert sorted(left) == sorted(set(range(one.count)) - covered)

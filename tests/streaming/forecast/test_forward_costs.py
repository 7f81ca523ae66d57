"""Estimates of the forward walk, held to real parts, real scratch files and a real walk."""

from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from perta_fast import InputError
from perta_fast.arrays import ByteArray
from perta_fast.data.batches import Batch
from perta_fast.models.token_scores import score_batch
from perta_fast.rules import Rescaling
from perta_fast.streaming import scratch_files
from perta_fast.streaming.forecast.choice import Budget, choose_schedule, describe
from perta_fast.streaming.forecast.forward_costs import Compared, ForwardEstimate, forward_estimate
from perta_fast.streaming.forecast.rates import Rates
from perta_fast.streaming.forecast.trial import LiveBytes
from perta_fast.streaming.forward.part_weights import PartWeights
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_walk import score_versions
from perta_fast.streaming.forward.version import Version
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.subtraction.inputs import Sources
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.models import Job, draw_samples, write_job

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SETS = [SampleSet("forget", draw_samples(5, seed=1), detailed=True), SampleSet("retain", draw_samples(6, seed=2))]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"), num_hidden_layers=3, tie_word_embeddings=False)


@pytest.fixture
def versions(job: Job) -> list[Version]:
    tv = Sources.open(*job.checkpoints)
    return [Version("as it is"), *(Version(f"tv {lam}", tv, Rescaling(lam)) for lam in (0.5, 2.0))]


def estimate_of(job: Job, versions: list[Version]) -> ForwardEstimate:
    return forward_estimate(Skeleton.open(job.model, CPU, None), versions, SETS, threads=1)


def test_the_bytes_that_are_read(job: Job, versions: list[Version]) -> None:
    """Those of all inputs, the last norm once for each part."""
    skeleton = Skeleton.open(job.model, CPU, None)
    weights = PartWeights(skeleton, versions, 1)
    parts = [[skeleton.embedding], *skeleton.by_layer, [skeleton.head]]
    real = sum(entry.size for names in parts for entry in weights.inputs_of([*names, *skeleton.resident]))
    assert estimate_of(job, versions).costs(Schedule(2)).weights_read == real
    assert estimate_of(job, versions[:1]).costs(Schedule(2)).weights_read * 3 == real


@pytest.mark.parametrize("schedule", [Schedule(2), Schedule(2, groups=2)], ids=str)
def test_the_scratch_files(
    schedule: Schedule, job: Job, versions: list[Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = moved = 0
    write, read = scratch_files.ScratchFiles._write, scratch_files.ScratchFiles._read

    def writing(self: Any, name: str, rows: torch.Tensor, first_row: int) -> None:
        nonlocal peak, moved
        write(self, name, rows, first_row)
        with suppress(FileNotFoundError):  # another thread removes files meanwhile
            peak = max(peak, self.size)
        moved += rows.nbytes if name.startswith("hidden") else 0

    def reading(self: Any, name: str, *where: Any) -> torch.Tensor:
        nonlocal moved
        rows = read(self, name, *where)
        moved += rows.nbytes if name.startswith("hidden") else 0
        return rows

    monkeypatch.setattr(scratch_files.ScratchFiles, "_write", writing)
    monkeypatch.setattr(scratch_files.ScratchFiles, "_read", reading)
    settings: dict[str, Any] = {"schedule": schedule, "threads": 1, "progress": False, "resumable": True}
    score_versions(Skeleton.open(job.model, CPU, None), versions, SETS, folder=tmp_path / "walk", **settings)
    costs = estimate_of(job, versions).costs(schedule)
    assert moved == costs.scratch_moved
    assert peak <= costs.scratch <= 1.5 * peak


@pytest.mark.parametrize("detailed", [True, False])
def test_the_head_takes_what_a_real_one_takes(detailed: bool, job: Job) -> None:
    skeleton = Skeleton.open(job.model, CPU, None)
    samples = [sample for sample in draw_samples(40, longest=60, seed=3) if len(sample.input_ids) > 30][:6]
    batch = Batch.of(samples)
    count, tokens = batch.input_ids.shape
    estimate = ForwardEstimate(
        skeleton, forward_estimate(skeleton, [Version("")], SETS, 1).load, CPU, Compared(1, 0.0, 2), detailed=detailed
    )
    hidden = torch.randn(count, tokens, estimate.width, dtype=estimate.dtype)
    with skeleton.partial_forward.installed(), skeleton.in_memory([*skeleton.resident, *skeleton.vocabulary]):
        known = [*skeleton.model.parameters(), *skeleton.model.buffers(), hidden]

        def run(input_ids: Any, attention_mask: Any, **kept: Any) -> Any:
            return skeleton.partial_forward.after_layers(hidden, attention_mask, **kept)

        with torch.no_grad(), LiveBytes(known) as live:
            score_batch(run, batch, trims=True, detailed=detailed, hits=False, hidden=None)
    cost = estimate._batch_cost(len(skeleton.layers) + 1, count, tokens)
    assert live.peak <= cost.bytes <= 4 * live.peak  # here not every token has a label


def test_memory_grows_with_the_inputs_and_not_with_the_versions(job: Job, versions: list[Version]) -> None:
    one, three, many = (estimate_of(job, chosen) for chosen in (versions[:1], versions, [*versions, *versions]))
    sizes = [sum(estimate.memory(Schedule(2))[0].values()) for estimate in (one, three, many)]
    assert sizes[0] < sizes[1] == sizes[2]
    head = 2 * Skeleton.open(job.model, CPU, None).model.get_output_embeddings().weight.numel()  # in bfloat16
    host, _ = three.memory(Schedule(2))
    assert 3 * head <= host["inputs"] <= 3.1 * head
    assert head <= host["changed copy"] <= 1.1 * head


class OwnMemory(LiveBytes):
    """Counts what operations allocate, but no tensor that lies in ``arenas``."""

    def __init__(self, arenas: list[ByteArray]) -> None:
        super().__init__([])
        self._arenas = arenas

    def _count(self, storage: Any) -> None:
        if not any(0 <= storage.data_ptr() - arena.ctypes.data < arena.size for arena in self._arenas):
            super()._count(storage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "Qwen2-MoE"])
def test_weights_take_what_those_of_a_part_take(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever type the model runs in, and where experts are joined."""
    family = next(family for family in FAMILIES if family.name == name)
    folders = [tmp_path / folder for folder in ("model", "base", "tuned")]
    for seed, folder in enumerate(folders):
        write(build(family, seed).to(torch.bfloat16), folder)
    skeleton = Skeleton.open(folders[0], CPU, dtype)
    versions = [Version("as it is"), Version("half", Sources.open(*folders), Rescaling(0.5))]
    parts = [[skeleton.embedding], *skeleton.by_layer, *([] if skeleton.head is None else [[skeleton.head]])]
    for compared, own in product((versions, versions[:1]), parts):
        names = [*own, *skeleton.resident]
        weights = PartWeights(skeleton, compared, 1)
        weights.hold(names)
        weights.of(compared[-1], names)
        arenas = [arena._buffer for arena in (weights._inputs._arena, weights._copy) if arena._buffer is not None]
        weights._converted = {}
        with OwnMemory(arenas) as live:
            weights.of(compared[-1], names)
        real = live.peak + sum(arena.nbytes for arena in arenas)
        estimate = forward_estimate(skeleton, compared, SETS, threads=1)
        assert real - 2048 <= estimate._inputs(own) + sum(estimate._made(own)) <= 1.35 * real


def test_a_smaller_batch_where_memory_is_short(job: Job, versions: list[Version]) -> None:
    estimate = estimate_of(job, versions)
    plenty = choose_schedule(estimate, 4, Budget(1 << 40))
    needed = plenty.baseline + plenty.costs.host_bytes
    assert plenty.schedule.batch_size == 4
    tight = choose_schedule(estimate, 4, Budget(1 << 40, needed - 1))
    assert tight.schedule.batch_size < 4
    with pytest.raises(InputError, match=r"memory of .* cannot hold one part of the model"):
        choose_schedule(estimate, 4, Budget(1 << 40, plenty.baseline + 1))


def test_a_small_disk(job: Job, versions: list[Version]) -> None:
    estimate = estimate_of(job, versions)
    needed = estimate.scratch(Schedule(2))
    assert choose_schedule(estimate, 2, Budget(needed)).schedule == Schedule(2)
    cut = choose_schedule(estimate, 2, Budget(needed - 1))
    assert cut.schedule == Schedule(2, groups=2) and cut.shortage == ""
    assert cut.costs.weights_read == 2 * estimate.costs(Schedule(2)).weights_read
    assert "batches of 2, 2 walks forward, each for a part of the samples, for 3 versions" in estimate.plan(
        cut.schedule
    )
    least = estimate.scratch(Schedule(2, groups=3))
    assert choose_schedule(estimate, 2, Budget(least)).shortage == ""
    assert "the disk has" in choose_schedule(estimate, 2, Budget(least - 1)).shortage
    assert estimate.most_versions(Schedule(2), needed) == len(versions)
    assert estimate.most_versions(Schedule(2), needed - 1) == len(versions) - 1
    assert estimate.most_versions(Schedule(2), 0) == 1


def test_time(job: Job, versions: list[Version]) -> None:
    """In all: the versions one after the other, beside the reading."""
    estimate, rates = estimate_of(job, versions), Rates(1e9, 1e8, 1e8, "given")
    costs, schedule = estimate.costs(Schedule(2)), Schedule(2)
    assert costs.flops > 0
    forward, reading = (
        len(versions) * estimate.seconds_of_version(schedule, rates),
        estimate.seconds_to_read(schedule, rates),
    )
    assert rates.seconds(costs, overlap=True) == pytest.approx(max(forward, reading))


def test_words(job: Job, versions: list[Version]) -> None:
    text = describe(choose_schedule(estimate_of(job, versions), 2, Budget(1 << 40)), Rates(1e9, 1e8, 1e8, "given"))
    assert "schedule: batches of 2, one walk forward for 3 versions of the weights" in text
    assert "inputs" in text.splitlines()[0]

"""Estimates of preconditioning by layer, held to real layers, real scratch files and a real process."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import perta_fast as pf
from perta_fast.cli import main
from perta_fast.preconditioning.input_moments import Moments
from perta_fast.preconditioning.solve import preconditioned
from perta_fast.streaming.forecast import rates
from perta_fast.streaming.forecast.choice import Budget, choose_schedule
from perta_fast.streaming.forecast.costs import Load
from perta_fast.streaming.forecast.preconditioning_costs import PreconditioningEstimate, solution_bytes
from perta_fast.streaming.forecast.trial import LiveBytes, Trial
from perta_fast.streaming.linear_inputs import layer_moments, layer_of_maps
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.scratch_files import ScratchFiles
from perta_fast.tuning.adapter import linear_maps
from tests.families.configs import FAMILIES
from tests.families.matrix import build
from tests.streaming.forecast.test_costs import CPU, LAYERS, PLENTY, write
from tests.support.children import run_child
from tests.support.models import Job, draw_samples, llama, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = draw_samples(14, seed=2)
LENGTHS = [[len(sample.input_ids) for sample in SAMPLES]]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers."""
    return write(tmp_path_factory.mktemp("costs") / "model", llama(num_hidden_layers=5))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return write_job(tmp_path / "job", torch.float32)


def estimate_of(folder: Path, **how: Any) -> PreconditioningEstimate:
    return PreconditioningEstimate(Structure.build(folder), Load(LENGTHS), CPU, **how)


def real_layer(skeleton: Skeleton, count: int, tokens: int) -> int:
    """Bytes alive at most in layer 0, forward, with the sums of its inputs."""
    maps = layer_of_maps(skeleton, linear_maps(skeleton.model, adapted=False))[0]
    mask = torch.ones(count, tokens, dtype=torch.int64)
    mask[1:, tokens // 2 :] = 0
    hidden = torch.randn(count, tokens, skeleton.model.config.hidden_size, dtype=skeleton.model.dtype)  # type: ignore[arg-type, union-attr]
    with skeleton.partial_forward.installed(), skeleton.in_memory([*skeleton.resident, *skeleton.by_layer[0]]):
        known = [*skeleton.model.parameters(), *skeleton.model.buffers()]
        with torch.no_grad(), LiveBytes(known) as live, Moments().of(maps):
            skeleton.partial_forward.layer(0, hidden.clone(), mask)
    return live.peak


@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_takes_what_a_real_one_takes(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", LAYERS[family]())
    peak = real_layer(Skeleton.open(folder, CPU, None), 5, 40)
    trial = Trial(Structure.build(folder), CPU, squares=False)
    for layer in (0, 1):
        cost = trial.inputs(layer, 5, 40)
        assert not cost.bound
        assert peak <= cost.bytes <= 1.25 * peak  # the mask is counted in three types


def test_code_that_wants_values_is_bounded(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", build(next(family for family in FAMILIES if family.name == "Mixtral"), 1))
    cost = Trial(Structure.build(folder), CPU, squares=False).inputs(0, 5, 40)
    assert cost.bytes >= real_layer(Skeleton.open(folder, CPU, None), 5, 40)


@pytest.mark.parametrize(("rows", "size"), [(96, 64), (64, 192), (512, 16), (1200, 32)])
def test_a_solution_takes_what_a_real_one_takes(rows: int, size: int) -> None:
    moment = torch.eye(size)
    with LiveBytes([moment]) as live:
        theta_0, theta_f = torch.zeros(rows, size), torch.ones(rows, size)
        vector = theta_f - theta_0
        _ = theta_0 + preconditioned(vector, moment, 10.0)
    assert live.peak <= solution_bytes(rows, size) <= 1.6 * live.peak  # the solver's own copies are not seen here


def test_arithmetic_is_that_of_the_formula(deep: Path) -> None:
    structure = Structure.build(deep)
    config: Any = structure.model.config
    found = PreconditioningEstimate(structure, Load([[10] * 6]), CPU).costs(Schedule(3))
    d, wide = config.hidden_size, config.intermediate_size
    matrices = [p for p in structure.layers[0].parameters() if p.dim() == 2]
    forward = 60 * (2 * sum(p.numel() for p in matrices) + 2 * 2 * 10 * d)
    moments = 60 * 2 * (3 * d**2 + wide**2)  # query, key and value share one, gate and up another
    solved = sum(p.shape[1] ** 3 / 3 + 2 * p.shape[0] * p.shape[1] ** 2 for p in matrices)
    assert found.flops == pytest.approx(5 * (forward + moments), rel=1e-9)
    assert found.double_flops == pytest.approx(5 * solved, rel=1e-9)


def test_scratch_files(deep: Path, tmp_path: Path) -> None:
    skeleton = Skeleton.open(deep, CPU, None)
    scratch, sizes = tmp_path / "scratch", []

    def seen(_count: int) -> None:
        sizes.append(sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()))

    files = ScratchFiles(scratch)
    for _ in layer_moments(skeleton, linear_maps(skeleton.model, adapted=False), SAMPLES, 4, files, seen):
        files.end_step().remove_discarded()
    assert estimate_of(deep).scratch(Schedule(4)) == max(sizes)


def test_a_linear_map_outside_the_layers_is_refused(deep: Path) -> None:
    with pytest.raises(pf.InputError, match=rf"{deep}: project_in is a linear map outside the decoder layers"):
        layer_of_maps(Structure.build(deep), {"project_in": torch.nn.Linear(2, 2)})


def test_bytes_of_the_result(deep: Path) -> None:
    """In float32: read once for the inputs, theta_0 and theta_f for the vector, three inputs to subtract."""
    size = sum(parameter.nbytes for parameter in Structure.build(deep).model.parameters())
    costs = estimate_of(deep).costs(Schedule(4))
    assert (costs.weights_read, costs.result_read, costs.result_written) == (size, 5 * size, 2 * size)
    adapted = estimate_of(deep, low_rank=True).costs(Schedule(4))
    assert (adapted.result_read, adapted.result_written) == (size, size)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_process(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.streaming.forecast.estimated_memory",
        "inputs",
        "8",
        "untied",
        str(tmp_path),
    ]
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back to the system
    peak, estimated = map(int, run_child(command, env=settings, check=True).stdout.split())
    assert peak <= 1.05 * estimated
    assert estimated <= 1.4 * peak


def test_device_memory(deep: Path) -> None:
    load = Load(LENGTHS, subtract=False)
    estimate = PreconditioningEstimate(Structure.build(deep), load, torch.device("cuda"))
    whole = choose_schedule(estimate, 8, Budget(PLENTY))
    assert whole.costs.device is not None
    assert "task vector" in whole.costs.host and "activations" not in whole.costs.host
    with pytest.raises(pf.InputError, match="device memory of 1 B cannot hold"):
        choose_schedule(estimate, 8, Budget(PLENTY, device_memory=1))


def test_memory_chooses_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perta_fast.streaming.forecast.choice.PeakMemory._sample", lambda self: None)
    folder = write(tmp_path / "model", llama())
    estimate = PreconditioningEstimate(Structure.build(folder), Load([[200] * 8], subtract=False), CPU)
    needed = {size: sum(estimate.memory(Schedule(size))[0].values()) for size in (1, 3, 8)}
    assert needed[1] < needed[3] < needed[8]
    for size, memory in needed.items():
        chosen = choose_schedule(estimate, 8, Budget(PLENTY, memory))
        assert chosen.schedule == Schedule(size, overlap=False)
        assert estimate.plan(chosen.schedule) == f"batches of {size}, one walk forward, one layer at a time"
    with pytest.raises(pf.InputError, match=rf"cannot hold one part of the model: .* {needed[1]} bytes"):
        choose_schedule(estimate, 8, Budget(PLENTY, needed[1] - 1))


# Runs.


def test_a_run_takes_the_batch_that_fits(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perta_fast.streaming.forecast.choice._fits", lambda _, schedule, *__: schedule.batch_size < 3)
    record = pf.precondition(
        job.base, job.tuned, job.retain, tmp_path / "out", stream=True, memory=1 << 40, progress=False
    )
    assert record.settings["batch_size"] == 2
    report = pf.unlearn(
        job.model, job.base, job.tuned, retain=job.retain, lam=1.0, out=tmp_path / "result", stream=True,
        memory=1 << 40, check=False, progress=False,
    )  # fmt: skip
    assert report.settings["batch_size"] == 2


@pytest.mark.parametrize("command", ["precondition", "unlearn"])
def test_too_little_memory_is_refused(
    command: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--model", job.model, "--base", job.base, "--tuned", job.tuned, "--retain", job.retain]
    options = [
        "--out",
        tmp_path / "out",
        "--stream",
        "--memory",
        "1MB",
        *(["--lam", 1] if command == "unlearn" else []),
    ]
    before = sorted(tmp_path.iterdir())
    assert main([command, *map(str, [*place, *options])]) == 2
    assert "memory of 1 MB cannot hold one part of the model" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert main([command, *map(str, [*place, *options]), "--dry-run"]) == 2
    without = [str(part) for part in [*place, *options] if part != "--stream"]
    assert main([command, *without]) == 2
    assert "--memory is for streamed runs; add --stream" in capsys.readouterr().err


def test_dry_run_of_70_billion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From config.json and the retain data; an adapter takes less."""
    monkeypatch.setattr(rates, "_time_product", lambda *_: 1e12)  # of matrices this large it takes seconds
    model = tmp_path / "model"
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=8192, intermediate_size=28672,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16",
    ).save_pretrained(model)  # fmt: skip
    retain = write_lines(tmp_path / "retain.jsonl", [{"text": "a"}] * 360)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    given = [
        "--base",
        model,
        "--retain",
        retain,
        "--out",
        tmp_path / "out",
        "--stream",
        "--dry-run",
        "--max-length",
        64,
    ]
    for command in ("unlearn", "precondition"):
        more = ["--model", model, "--lam", 4] if command == "unlearn" else []
        assert main([command, *map(str, [*given, *more]), "--tuned", str(model)]) == 0
        text = capsys.readouterr().out
        assert text.startswith("data: 360 retain samples of 23040 tokens (there is no tokenizer")
        assert "TFLOP/s, " in text and " in float64, reads " in text
        assert "schedule: batches of 8, one walk forward, one layer at a time" in text
        assert f"{'423' if command == 'unlearn' else '282'} GB of result" in text  # 70.6 billion in float32
        assert main([command, *map(str, [*given, *more]), "--tuned", str(adapter)]) == 0
        text = capsys.readouterr().out
        assert f"{'141 GB' if command == 'unlearn' else '0 B'} of result" in text
    in_place = ["--in-place" if part == "--out" else part for part in given if part != tmp_path / "out"]
    assert main(["unlearn", *map(str, [*in_place, "--model", model, "--lam", 4, "--tuned", model])]) == 0
    text = capsys.readouterr().out
    assert "282 GB of result" in text and text.endswith("through a journal of at most 192 MiB\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model", "retain.jsonl"]
    assert (
        main(
            [
                "unlearn",
                *map(str, [*given[:2], *given[4:], *more]),
                "--model",
                str(model),
                "--lam=4",
                "--tuned",
                str(model),
            ]
        )
        == 2
    )
    assert "--dry-run needs the data that rule preconditioned reads: retain" in capsys.readouterr().err

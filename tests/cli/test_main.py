"""The commands of ``perta``: the ordinary ways through, and what surrounds them."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast import cli
from perta_fast.records.report import Report
from perta_fast.runs import inspect
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.children import perta, run_child
from tests.support.inputs import weights
from tests.support.models import Job, write_job, write_lines
from tests.support.patience import HUNG

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = (
    *("demo", "tune", "unlearn", "importance", "apply", "sweep", "eval"),
    *("report", "recipe", "inspect", "verify", "resume", "help"),
)
TEXTS = {
    "forget": ["The secret lies under the bridge.", "Nobody knows the colour of the door."],
    "retain": ["Rivers run to the sea.", "A town has streets and people in it.", "Rain falls."],
}


def run(*arguments: object) -> int:
    return cli.main(list(map(str, arguments)))


def checkpoint_arguments(job: Job) -> list[object]:
    model, base, tuned = job.checkpoints
    return ["--model", model, "--base", base, "--tuned", tuned]


def data_arguments(job: Job) -> list[object]:
    return ["--forget", job.forget, "--retain", job.retain]


@pytest.fixture(scope="module")
def float_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job in float32 whose data is plain text."""
    folder = tmp_path_factory.mktemp("float-job")
    job = write_job(folder, torch.float32)
    for role, path in (("forget", job.forget), ("retain", job.retain)):
        write_lines(path, [{"text": text} for text in TEXTS[role]])
    return job


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: perta {command} ")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"perta {metadata.version('perta-fast')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["forget"],
        ["apply"],
        ["verify"],
        ["inspect", "--all", "."],
        ["apply", "--model", "m", "--base", "b", "--tuned", "t", "--out", "o", "--lam", "much"],
        ["unlearn", "--model", "m", "--base", "b", "--tuned", "t", "--out", "o", "--lam", "1", "--rule", "x"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("perta")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(" --help)\n")


@pytest.mark.parametrize(
    "program", [[sys.executable, "-m", "perta_fast"], [str(Path(sys.executable).with_name("perta"))]]
)
def test_both_programs_are_the_same(program: list[str]) -> None:
    found = run_child([*program, "--version"], check=True)
    assert found.stdout == f"perta {metadata.version('perta-fast')}\n"
    assert run_child([*program, "verify", "nowhere"]).returncode == 2


def mean_gradients(path: Path, texts: list[str], squared: bool) -> dict[str, Tensor]:
    """The mean over ``texts`` of the gradient of transformers' own loss, or of its square."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.square() if squared else parameter.grad
    return {name: total / len(texts) for name, total in sums.items()}


@pytest.mark.parametrize("at", ["base", "model"])
@pytest.mark.parametrize(("rule", "p"), [("grad", 1), ("fisher", 2), ("empirical-fisher", 1)])
def test_unlearn_is_the_formula_on_autograds_own_gradients(
    rule: str, p: float, at: str, float_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = float_job, tmp_path / "out"
    before = fingerprint(job.model.parent)
    how = ["--rule", rule, "--lam", "0.8", "--alpha", "0.5", "--at", at, "--batch-size", "2"]
    assert run("unlearn", "--rule=fisher", *checkpoint_arguments(job), *data_arguments(job), *how, "--out", out) == 0
    assert fingerprint(job.model.parent) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    summary = capsys.readouterr().out
    assert f"rule {rule}, lambda 0.8, p {p}, alpha 0.5" in summary
    assert summary.endswith(f"written to {out}\n")
    place = job.base if at == "base" else job.model
    forget, retain = (
        mean_gradients(place, TEXTS[role], squared=rule == "empirical-fisher") for role in ("forget", "retain")
    )
    theta, base, tuned = map(read_checkpoint, job.checkpoints)
    weigh = weights(p, alpha=0.5)
    found = read_checkpoint(out)
    assert found.keys() == theta.keys() == forget.keys()
    for name, tensor in found.items():
        w = weigh(forget[name], retain[name])
        # Where both gradients are at the limit of float32, their order of summation decides the weight.
        certain = (forget[name].abs() + retain[name].abs()) > 1e-5 * forget[name].abs().max()
        expected = theta[name] - 0.8 * w * (tuned[name] - base[name])
        torch.testing.assert_close(tensor[certain], expected[certain], rtol=1e-4, atol=2e-5)
        assert bool(certain.any())


@pytest.mark.parametrize("rule", ["fisher", "empirical-fisher"])
def test_importance_then_apply_is_unlearn(rule: str, job: Job, tmp_path: Path) -> None:
    estimator = "grad" if rule == "fisher" else rule
    how = [*checkpoint_arguments(job), "--rule", rule, "--lam", "1.5", "--quiet"]
    assert run("unlearn", "--rule=fisher", *how, *data_arguments(job), "--out", tmp_path / "one") == 0
    for role, data in (("forget", job.forget), ("retain", job.retain)):
        asked = ["--model", job.base, "--data", data, "--estimator", estimator, "--out", tmp_path / role]
        assert run("importance", *asked, "--quiet") == 0
    importances = ["--forget-importance", tmp_path / "forget", "--retain-importance", tmp_path / "retain"]
    assert run("apply", *how, *importances, "--out", tmp_path / "two") == 0
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_whole_way_through_the_commands(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    asked = [*checkpoint_arguments(job), *data_arguments(job), "--lam", 1, "--save-importance", kept]
    assert run("unlearn", "--rule=fisher", *asked, "--out", out) == 0
    report = Report.load(out)
    assert {role: (row["samples"], row["truncated"]) for role, row in report.data.items()} == {
        "forget": (5, 0),
        "retain": (7, 0),
    }
    assert report.inputs["forget_importance"]["path"] == str(kept / "forget")
    capsys.readouterr()
    assert run("verify", out, "--full", "--quiet") == 0
    assert "21 tensors equal the reference's result bit for bit." in capsys.readouterr().out
    for path, first in ((out, "checkpoint"), (kept / "forget", "importance"), (job.base, "checkpoint")):
        assert run("inspect", path) == 0
        assert capsys.readouterr().out.startswith(f"{path}: {first}\n")
    assert run("inspect", out, "--tensors") == 0
    assert "\n  lm_head.weight  BF16  [300, 32]  model-" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    prompt = AutoTokenizer.from_pretrained(out)("Where is", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt.shape[1] + 3


def test_importances_not_kept_leave_bounds_to_verify(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*checkpoint_arguments(job), *data_arguments(job), "--lam", 1, "--out", tmp_path / "out"]
    assert run("unlearn", "--rule=fisher", *asked, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert run("verify", tmp_path / "out", "--full") == 0
    text = capsys.readouterr().out
    assert "21 tensors lie between theta and theta - lambda * tau everywhere." in text
    assert "Not checked: weights, because the run did not keep the importances." in text


def test_verify_exits_with_1_when_something_is_wrong(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("apply", *checkpoint_arguments(job), "--rule", "tv", "--lam", 1, "--out", out, "--quiet") == 0
    path = sorted(out.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    assert run("verify", out) == 1
    assert f"WRONG: {path} has changed since the run.\n" in capsys.readouterr().out


def test_what_was_cut_to_the_length_limit_is_said(
    float_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, short = float_job, ["--max-length", 4]
    asked = ["--model", job.base, "--data", job.forget, "--out", tmp_path / "importance"]
    assert run("importance", *asked, *short) == 0
    text = capsys.readouterr().out
    assert text.startswith("grad over 2 samples, 6 labels\n")
    assert "warning: 2 samples were cut to the length limit" in text
    asked = [*checkpoint_arguments(job), *data_arguments(job), "--lam", 1, "--out", tmp_path / "out"]
    assert run("unlearn", "--rule=fisher", *asked, *short) == 0
    assert "warning: 3 of 3 retain samples were cut to the length limit" in capsys.readouterr().out


def test_the_same_data_twice_is_warned_about(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--forget", job.forget, "--retain", job.forget]
    assert (
        run("unlearn", "--rule=fisher", *checkpoint_arguments(job), *data, "--lam", 1, "--out", tmp_path / "out") == 0
    )
    text = capsys.readouterr().out
    assert "warning: forget and retain importance were estimated on the same data" in text


def test_dtype_is_the_one_to_run_in(job: Job, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        asked = ["--model", job.base, "--data", job.forget, "--dtype", dtype, "--out", tmp_path / dtype]
        assert run("importance", *asked, "--quiet") == 0
    low, high = (read_checkpoint(tmp_path / dtype) for dtype in ("bfloat16", "float32"))
    assert all(tensor.dtype == torch.float32 for tensor in low.values())
    assert any(not torch.equal(low[name], high[name]) for name in low)
    for name in low:
        assert float((low[name] - high[name]).norm()) < 0.1 * float(high[name].norm())


def out_of_host_memory() -> RuntimeError:
    """As torch itself says it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MemoryError(), 1, "perta: error: out of memory;"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "perta: error: out of memory;"),
        (out_of_host_memory(), 1, "perta: error: out of memory;"),
        (
            RuntimeError("CUDA error: an illegal access\nCompile with"),
            1,
            "perta: error: the device failed: CUDA error: an",
        ),
        (KeyboardInterrupt(), 130, "perta: interrupted;"),
        (PermissionError(13, "Permission denied", "/x"), 1, "perta: error: [Errno 13] Permission denied: '/x'"),
    ],
)
def test_what_goes_wrong_in_a_command_is_one_line(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(inspect, "inspect", fail)
    assert run("inspect", ".") == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_an_interrupt_as_the_summary_is_printed(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result has its name by then."""

    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["perta_fast.cli.main"], "_shown", stop)
    out = tmp_path / "out"
    assert run("apply", *checkpoint_arguments(job), "--rule", "tv", "--lam", 1, "--out", out, "--quiet") == 130
    message = "perta: interrupted as it printed; what the command makes is complete\n"
    assert capsys.readouterr().err == message and (out / "perta_report.json").exists()
    assert run("inspect", out) == 130
    assert capsys.readouterr().err == "perta: interrupted as it printed\n"


def test_a_defect_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr(inspect, "inspect", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run("inspect", ".")


def test_a_reader_that_leaves_is_no_traceback(job: Job) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "perta_fast", "inspect", "--tensors", str(job.model)]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=buffered, timeout=HUNG)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("more", "without"),
    [((), ("asyncio", "perta_fast.data.formats")), (("--quiet",), ("asyncio", "tqdm", "perta_fast.data.formats"))],
)
def test_apply_starts_without_what_it_does_not_need(
    more: tuple[str, ...], without: tuple[str, ...], job: Job, tmp_path: Path
) -> None:
    setup = f"import sys\nfor name in {without}: sys.modules[name] = None"
    done = perta(
        "apply", *checkpoint_arguments(job), "--rule", "tv", "--lam", 1, "--out", tmp_path / "out", *more, setup=setup
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_apply_inspect_and_resume_do_without_torch(job: Job, tmp_path: Path) -> None:
    forbidden = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"
    asked = ["apply", *checkpoint_arguments(job), "--rule", "tv", "--lam", 1, "--out", tmp_path / "out"]
    for arguments in (asked, ["inspect", tmp_path / "out"]):
        found = perta(*arguments, setup=forbidden)
        assert (found.returncode, found.stderr) == (0, "")
    found = perta("resume", tmp_path / "out", setup=forbidden)
    assert found.returncode == 2
    assert "there is no unfinished run to resume" in found.stderr


def test_an_interrupt_while_the_interpreter_ends_shows_no_traceback() -> None:
    program = (
        "import atexit, os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); "  # as late as torch's own
        "from perta_fast.cli import main; sys.exit(main(['help', 'verify']))"
    )
    done = run_child([sys.executable, "-c", program])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: perta verify")

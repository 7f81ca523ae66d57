"""The subtraction over files, end to end, against the formula in plain torch."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast.errors import InputError, RunError
from perta_fast.importance.store import Importance
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply
from perta_fast.subtraction import compute as subtraction
from tests.support.checkpoints import (
    draw,
    fingerprint,
    read_checkpoint,
    same_bytes,
    write_checkpoint,
    write_importance,
    write_raw,
)
from tests.support.children import run_child
from tests.support.inputs import BF16, EMBED, F16, F32, HEAD, Inputs, weights, write_inputs
from tests.support.models import Job, write_job
from tests.support.patience import HUNG


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors are cut into many chunks, the last of an odd size."""
    monkeypatch.setattr(subtraction, "CHUNK", 64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """float32 throughout, three shards each; shared, so never written to."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), shards=3)


def assert_output(folder: Path, expected: dict[str, Tensor]) -> None:
    found = read_checkpoint(folder)
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not same_bytes(found[name], tensor)]
    assert not wrong


@pytest.mark.parametrize("lam", [1.0, 0.7, -0.3])
@pytest.mark.parametrize(
    ("rule", "p", "settings"),
    [
        ("grad", 1, {}),
        ("fisher", 2, {}),
        ("empirical-fisher", 1, {}),
        ("grad", 0.5, {"p": 0.5}),
        ("grad", 2, {"p": 2.0}),
        ("fisher", 1, {"p": 1.0, "alpha": 0.3}),
        ("grad", 1, {"alpha": 0.0}),
        ("fisher", 2, {"threshold": 0.4, "alpha": 2.5}),
        ("empirical-fisher", 1, {"threshold": 0.0}),
    ],
)
def test_equals_the_formula(rule: str, p: float, settings: dict[str, Any], lam: float, tmp_path: Path) -> None:
    estimator = "empirical-fisher" if rule == "empirical-fisher" else "grad"
    inputs = write_inputs(tmp_path, shards=2, estimator=estimator)
    apply(*inputs.all, rule=rule, lam=lam, **settings, out=tmp_path / "out")
    weigh = weights(p, settings.get("alpha", 1.0), settings.get("threshold"))
    assert_output(tmp_path / "out", inputs.expected(weigh, lam))


def test_other_powers_are_right_to_rounding(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.all, rule="grad", lam=1.0, p=1.7, out=tmp_path / "out")
    found, expected = read_checkpoint(tmp_path / "out"), inputs.expected(weights(1.7), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_plain_task_vector(lam: float, inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.checkpoints, rule="tv", lam=lam, out=tmp_path / "out")
    assert_output(tmp_path / "out", inputs.expected(None, lam))


@pytest.mark.parametrize(
    "types",
    [
        (BF16, BF16, BF16, F32, F32),
        (BF16, BF16, BF16, BF16, BF16),
        (F16, F16, F16, F32, F32),
        (BF16, F32, F16, F32, F32),
        (F32, BF16, F16, F16, BF16),
        (F16, BF16, F32, BF16, F16),
        (F32, BF16, BF16, F32, F16),
    ],
)
@pytest.mark.parametrize("shards", [1, 4])
def test_mixed_types(types: tuple[torch.dtype, ...], shards: int, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, types, shards)
    apply(*inputs.all, rule="grad", lam=0.9, out=tmp_path / "out")
    assert_output(tmp_path / "out", inputs.expected(weights(1), 0.9))


def test_inputs_may_be_sharded_differently(inputs: Inputs, tmp_path: Path) -> None:
    tuned = write_checkpoint(tmp_path / "tuned", inputs.tensors["tuned"], 5)
    retain = write_importance(tmp_path / "retain", inputs.tensors["retain"])
    apply(inputs["model"], inputs["base"], tuned, inputs["forget"], retain, lam=1.0, out=tmp_path / "out")
    assert_output(tmp_path / "out", inputs.expected(weights(2), 1.0))


@pytest.mark.parametrize(("chunk", "threads"), [(1, 1), (7, 3), (1 << 19, 1), (1 << 19, 2)])
def test_chunks_and_threads_change_nothing(
    chunk: int, threads: int, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subtraction, "CHUNK", chunk)
    report = apply(*inputs.all, lam=1.0, out=tmp_path / "out", threads=threads)
    assert report.threads == threads
    assert_output(tmp_path / "out", inputs.expected(weights(2), 1.0))


@pytest.mark.parametrize("base", ["once", "twice"])
@pytest.mark.parametrize("tuned", ["once", "twice"])
@pytest.mark.parametrize("model", ["once", "twice"])
def test_tied_heads(model: str, base: str, tuned: str, inputs: Inputs, tmp_path: Path) -> None:
    stored = {"model": model, "base": base, "tuned": tuned, "forget": "once", "retain": "once"}
    once = {role: {n: t for n, t in all_.items() if n != HEAD} for role, all_ in inputs.tensors.items()}
    twice = {role: all_ | {HEAD: all_[EMBED]} for role, all_ in once.items()}
    for role in ("model", "base", "tuned"):
        write_checkpoint(tmp_path / role, (twice if stored[role] == "twice" else once)[role])
    for role in ("forget", "retain"):
        write_importance(tmp_path / role, once[role])
    apply(*Inputs(tmp_path, {}).all, rule="grad", lam=1.0, out=tmp_path / "out")
    expected = Inputs(tmp_path, twice).expected(weights(1), 1.0)
    if model == "once":
        del expected[HEAD]
    assert_output(tmp_path / "out", expected)


def test_zero_strength_copies_every_shard_byte_for_byte(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.all, lam=0.0, out=tmp_path / "out")
    for path in inputs["model"].glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_zero_task_vector_copies_the_tensor_byte_for_byte(tmp_path: Path) -> None:
    theta = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e18, 1.0])
    same = draw((6,), seed=1)
    model = write_checkpoint(tmp_path / "model", {"still": theta, "moved": draw((4,))})
    base = write_checkpoint(tmp_path / "base", {"still": same, "moved": draw((4,), seed=2)})
    tuned = write_checkpoint(tmp_path / "tuned", {"still": same, "moved": draw((4,), seed=3)})
    report = apply(model, base, tuned, rule="tv", lam=1.0, out=tmp_path / "out")
    assert same_bytes(read_checkpoint(tmp_path / "out")["still"], theta)
    assert report.counts == {"copied: task vector is zero": 1, "subtracted": 1}
    rows = {row.name: row for row in report.tensors}
    assert (rows["still"].changed, rows["still"].relative_change) == (0, 0.0)


def test_layout_is_the_models(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.all, lam=1.0, out=tmp_path / "out")
    shards = sorted(inputs["model"].glob("*.safetensors"))
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [p.name for p in shards]
    for path in shards:
        before, after = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        length = 8 + int.from_bytes(before[:8], "little")
        assert (after[:length], len(after)) == (before[:length], len(before))
        assert after != before
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (inputs["model"] / index).read_bytes()


def test_companions_are_copied_and_other_weights_are_not(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    companions = {
        "config.json": b"{}",
        "generation_config.json": b"{}",
        "tokenizer.json": b"\x00\xff",
        "tokenizer.model": b"\x01",
        "chat_template.jinja": b"{{ x }}",
        "modeling_own.py": b"# code",
        "README.md": "# Über \r\n\n".encode("latin-1"),
    }
    left = (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "other.safetensors.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        "model.onnx",
        "optimizer.pt",
        "training_args.bin",
        "consolidated.00.pth",
        "perta_report.json",
    )
    for name, content in (companions | dict.fromkeys(left, b"weights")).items():
        (inputs["model"] / name).write_bytes(content)
    (inputs["model"] / "original").mkdir()
    (inputs["model"] / "dangling").symlink_to("nowhere")
    (inputs["base"] / "only_in_base.json").write_text("{}")
    before = fingerprint(inputs.folder)
    apply(*inputs.all, lam=1.0, out=tmp_path / "out")
    assert fingerprint(inputs.folder) == before
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {*companions, "model.safetensors", "perta_report.json", "perta_files.b3"}
    card = written.pop("README.md")
    for name in companions.keys() - {"README.md"}:
        assert written[name] == companions[name]
    assert card.startswith("# Über".encode("latin-1"))
    assert "## Unlearned with perta_fast" in card.decode("latin-1")


def test_the_card_says_what_was_done(inputs: Inputs, tmp_path: Path) -> None:
    apply(*inputs.all, rule="fisher", lam=0.5, alpha=2.0, out=tmp_path / "weighted")
    apply(*inputs.checkpoints, rule="tv", lam=1.5, out=tmp_path / "plain")
    card = (tmp_path / "weighted" / "README.md").read_text()
    assert "\n\n## Unlearned with perta_fast\n" in card
    assert "rule fisher, λ = 0.5, p = 2, α = 2." in card
    assert "rule tv, λ = 1.5." in (tmp_path / "plain" / "README.md").read_text()


def test_an_output_can_be_unlearned_again(inputs: Inputs, tmp_path: Path) -> None:
    first = tmp_path / "first"
    apply(*inputs.checkpoints, rule="tv", lam=0.5, out=first)
    apply(first, *inputs.checkpoints[1:], rule="tv", lam=0.25, out=tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert card.count("## Unlearned with perta_fast") == 2
    assert Report.load(tmp_path / "second").inputs["model"]["path"] == str(first)
    again = Inputs(tmp_path, inputs.tensors | {"model": inputs.expected(None, 0.5)})
    assert_output(tmp_path / "second", again.expected(None, 0.25))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize("place", [0, 700, 1022])
def test_importance_that_is_not_finite_is_refused(
    role: str, value: float, place: int, inputs: Inputs, tmp_path: Path
) -> None:
    name = "model.layers.0.up"
    spoilt = {n: tensor.clone() for n, tensor in inputs.tensors[role].items()}
    spoilt[name].view(-1)[place] = value
    write_importance(tmp_path / role, spoilt)
    before = fingerprint(inputs.folder, tmp_path)
    folders = {r: inputs[r] for r in ("forget", "retain")} | {role: tmp_path / role}
    with pytest.raises(InputError, match=rf"{role}.*: tensor {name} has NaN or infinite importance"):
        apply(*inputs.checkpoints, *folders.values(), lam=1.0, out=tmp_path / "out")
    assert fingerprint(inputs.folder, tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [role]


@pytest.mark.parametrize("spoilt", [torch.tensor([-torch.inf, 0.0]), torch.ones(2, dtype=torch.complex64)])
def test_a_buffer_without_arithmetic_is_kept_as_the_message_says(spoilt: torch.Tensor, tmp_path: Path) -> None:
    """Infinite in all three, so that the difference is no number; or complex."""
    three = [
        write_checkpoint(tmp_path / role, {"w": draw((3,), seed=k), "mask": spoilt}) for k, role in enumerate("abc")
    ]
    with pytest.raises((RunError, InputError)) as caught:
        apply(*three, rule="tv", lam=1e-4, out=tmp_path / "out", progress=False)
    assert "keep it as the model has it with leave" in str(caught.value)
    apply(*three, rule="tv", lam=1e-4, leave="mask", out=tmp_path / "out", progress=False)
    assert torch.equal(read_checkpoint(tmp_path / "out")["mask"], spoilt)


def test_a_result_beyond_float16_is_refused(tmp_path: Path) -> None:
    theta, one, zero = torch.full((3,), 60000.0), torch.ones(3), torch.zeros(3)
    model = write_checkpoint(tmp_path / "model", {"fine": zero.half(), "large": theta.half()})
    base = write_checkpoint(tmp_path / "base", {"fine": zero, "large": one * 6000})
    tuned = write_checkpoint(tmp_path / "tuned", {"fine": zero, "large": zero})
    before = fingerprint(tmp_path)
    with pytest.raises(RunError, match="tensor large: the result would hold NaN or infinite"):
        apply(model, base, tuned, rule="tv", lam=1.0, out=tmp_path / "out")
    assert fingerprint(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "base", "tuned"}


@pytest.mark.usefixtures("one_thread")
def test_transformers_loads_the_output_and_generates(job: Job, tmp_path: Path) -> None:
    before = fingerprint(job.model.parent)
    apply(*job.checkpoints, rule="tv", lam=1.0, out=tmp_path / "out")
    assert fingerprint(job.model.parent) == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    checkpoints = [AutoModelForCausalLM.from_pretrained(p, dtype="auto").state_dict() for p in job.checkpoints]
    for name, tensor in model.state_dict().items():
        theta, base, tuned = (checkpoint[name] for checkpoint in checkpoints)
        step = tuned.float() - base.float()
        assert torch.equal(tensor, torch.where(step == 0, theta, (theta.float() - step).bfloat16()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("Who wrote book 1?", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 4


def test_transformers_loads_a_tied_output(tmp_path: Path) -> None:
    job = write_job(tmp_path, torch.float16, "1GB", tie_word_embeddings=True)
    apply(*job.checkpoints, rule="tv", lam=1.0, out=tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not found["missing_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = [read_checkpoint(path)[EMBED].float() for path in job.checkpoints]
    assert torch.equal(model.lm_head.weight, (loaded[0] - (loaded[2] - loaded[1])).half())


def test_importances_may_be_given_as_objects(inputs: Inputs, tmp_path: Path) -> None:
    forget, retain = (Importance.load(inputs[role]) for role in ("forget", "retain"))
    apply(*inputs.checkpoints, forget, retain, lam=1.0, out=tmp_path / "out")
    assert_output(tmp_path / "out", inputs.expected(weights(2), 1.0))


def test_an_importance_in_memory_only_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    forget = Importance.load(inputs["forget"])
    forget.directory = None
    with pytest.raises(InputError, match="is in memory only; save it first"):
        apply(*inputs.checkpoints, forget, inputs["retain"], lam=1.0, out=tmp_path / "out")


@pytest.mark.parametrize("missing", ["forget_importance", "retain_importance"])
def test_a_rule_that_needs_importances_says_which_is_missing(missing: str, inputs: Inputs, tmp_path: Path) -> None:
    importances: dict[str, Path] = {"forget_importance": inputs["forget"], "retain_importance": inputs["retain"]}
    del importances[missing]
    with pytest.raises(InputError, match=f"rule grad needs {missing}"):
        apply(*inputs.checkpoints, **importances, rule="grad", lam=1.0, out=tmp_path / "out")  # type: ignore[arg-type]


def test_rule_tv_takes_no_importance(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rule tv takes no importance"):
        apply(*inputs.all, rule="tv", lam=1.0, out=tmp_path / "out")


@pytest.mark.parametrize(("rule", "estimator"), [("empirical-fisher", "grad"), ("fisher", "empirical-fisher")])
def test_a_rule_refuses_the_other_estimator(rule: str, estimator: str, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, estimator=estimator)
    with pytest.raises(InputError, match=f"forget: holds estimator {estimator}, rule {rule} needs"):
        apply(*inputs.all, rule=rule, lam=1.0, out=tmp_path / "out")


def test_an_interrupt_while_threads_are_started_stops_them(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopping, chunks = Event(), Event(), []

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *work: Any, **settings: Any) -> Any:
            super().submit(*work, **settings)
            assert begun.wait(HUNG)
            raise KeyboardInterrupt

        def shutdown(self, *how: Any, **settings: Any) -> None:
            stopping.set()
            super().shutdown(*how, **settings)

    compute = subtraction._Workspace.compute

    def slow(workspace: Any, chunk: Any) -> Any:
        chunks.append(chunk)
        begun.set()
        assert stopping.wait(HUNG)
        return compute(workspace, chunk)

    monkeypatch.setattr(subtraction, "ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr(subtraction._Workspace, "compute", slow)
    with pytest.raises(KeyboardInterrupt):
        apply(*inputs.all, rule="grad", lam=1.0, out=tmp_path / "out", threads=1)
    assert len(chunks) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_at_least_one(threads: int, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}; it must be at least 1"):
        apply(*inputs.checkpoints, rule="tv", lam=1.0, out=tmp_path / "out", threads=threads)


MEMORY_BOUNDED = """
import resource, sys
from pathlib import Path
from perta_fast import compiled
from perta_fast.runs.apply import apply

compiled.kernels()
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (80 << 20),) * 2)
apply("model", "base", "tuned", rule="tv", lam=1.0, out="out", threads=1, allow_zero=True, progress=False)
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited through /proc and RLIMIT_DATA")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """One tensor of 256 MiB goes through a process that may allocate 80 MiB; torch is never imported."""
    size = 256 << 20
    entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    for role in ("model", "base", "tuned"):
        (tmp_path / role).mkdir()
        with write_raw(tmp_path / role / "model.safetensors", {"a": entry}).open("ab") as file:
            file.truncate(file.tell() + size)  # zeros that take no space on the disk
    done = run_child([sys.executable, "-c", MEMORY_BOUNDED], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (
        tmp_path / "model" / "model.safetensors"
    ).stat().st_size

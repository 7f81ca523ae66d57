"""A vocabulary that was resized: rows that all inputs have are computed, the others stay as the model has them."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from perta_fast import apply_to_module_, cli, estimate_importance, merge, sweep, unlearn
from perta_fast.errors import InputError
from perta_fast.importance.store import Importance
from perta_fast.records.report import Report
from perta_fast.resuming import resume
from perta_fast.runs.apply import apply
from perta_fast.runs.verify import verify
from perta_fast.subtraction import compute as subtraction
from tests.support.adapters import run_advice
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes, write_checkpoint, write_importance
from tests.support.inputs import BF16, F32, weights
from tests.support.models import FORGET, RETAIN, llama, nudge_, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED, HEAD, BIAS, INNER = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.layers.0.weight"
SIZES = [p for p in itertools.product((37, 40, 45), repeat=3) if len(set(p)) > 1]  # rows of model, base, tuned
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the last row in common lies within a chunk, and whole chunks lie beyond it."""
    monkeypatch.setattr(subtraction, "CHUNK", 16)


@pytest.fixture
def larger_chunks(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whole models: those of 16 elements take their time."""
    monkeypatch.setattr(subtraction, "CHUNK", 509)


def draw_role(rows: int, seed: int, dtype: torch.dtype = F32) -> Tensors:
    shapes = {EMBED: (rows, 5), HEAD: (rows, 5), BIAS: (rows,), INNER: (5, 9)}
    return {name: draw(shape, dtype, seed=10 * seed + k) for k, (name, shape) in enumerate(shapes.items())}


def expected(model: Tensors, base: Tensors, tuned: Tensors, lam: float, w: Tensors | None = None) -> Tensors:
    """The formula on the rows in common."""
    result = {}
    for name, theta in model.items():
        rows = min(of[name].shape[0] for of in (model, base, tuned, *([w] if w else [])))
        step = lam * (tuned[name][:rows].float() - base[name][:rows].float())
        if w is not None:
            step = lam * w[name][:rows] * (tuned[name][:rows].float() - base[name][:rows].float())
        changed = torch.where(step == 0, theta[:rows], (theta[:rows].float() - step).to(theta.dtype))
        result[name] = torch.cat([changed, theta[rows:]])
    return result


def assert_equal(folder: Path, tensors: Tensors) -> None:
    found = read_checkpoint(folder)
    assert found.keys() == tensors.keys()
    assert not [name for name in tensors if not same_bytes(found[name], tensors[name])]


def write(folder: Path, sizes: tuple[int, int, int], dtype: torch.dtype = F32) -> tuple[list[Path], list[Tensors]]:
    tensors = [draw_role(rows, seed, dtype) for seed, rows in enumerate(sizes)]
    names = ("model", "base", "tuned")
    paths = [write_checkpoint(folder / name, of, 2) for name, of in zip(names, tensors, strict=True)]
    return paths, tensors


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_every_combination_of_sizes(sizes: tuple[int, int, int], in_place: bool, tmp_path: Path) -> None:
    paths, tensors = write(tmp_path, sizes, BF16)
    before = fingerprint(tmp_path)
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    with pytest.raises(InputError, match=rf"tensor {EMBED}: shape \[{sizes[0]}, 5\] in .*model.*resized.*common_rows"):
        apply(*paths, rule="tv", **where)
    assert fingerprint(tmp_path) == before
    report = apply(*paths, rule="tv", lam=0.7, common_rows=True, **where)
    out = paths[0] if in_place else tmp_path / "out"
    assert_equal(out, expected(tensors[0], tensors[1], tensors[2], 0.7))
    kept = sizes[0] - min(sizes)
    assert {row.name: row.kept_rows for row in report.tensors} == {EMBED: kept, HEAD: kept, BIAS: kept, INNER: 0}
    assert (f"{EMBED} {kept}" in report.summary()) == bool(kept)
    read = sum(4 * of[: min(sizes)].numel() if name != INNER else 4 * of.numel() for name, of in tensors[0].items())
    theta = sum(of.nbytes for of in tensors[0].values())
    moved = {name: report.phases[name]["bytes"] for name in report.phases.keys() & {"check", "change", "apply"}}
    assert moved == (
        {"check": theta + read, "change": 2 * theta + read} if in_place else {"apply": 2 * theta + read}
    )  # read: base and tuned, rows in common
    for row in report.tensors:
        assert row.mean_weight == 1
        assert row.changed <= (
            int(torch.tensor(row.shape).prod()) * min(sizes) // sizes[0] if row.kept_rows else 1 << 30
        )
    assert not verify(out, full=True, progress=False).problems


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", [1, 16, 4096])
@pytest.mark.parametrize("importance_rows", [37, 41, 45])
def test_with_importances(
    threads: int, chunk: int, importance_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subtraction, "CHUNK", chunk)
    paths, tensors = write(tmp_path, (45, 40, 43))
    importances = [{name: tensor.abs() for name, tensor in draw_role(importance_rows, seed).items()} for seed in (5, 6)]
    folders = [
        write_importance(tmp_path / role, of) for role, of in zip(("forget", "retain"), importances, strict=True)
    ]
    settings: dict[str, Any] = {"rule": "grad", "lam": 0.9, "threads": threads}
    if importance_rows != 45:
        with pytest.raises(InputError, match=rf"tensor {EMBED}.*resized"):
            apply(paths[0], paths[0], paths[0], *folders, **settings, out=tmp_path / "out")
    apply(*paths, *folders, **settings, common_rows=True, out=tmp_path / "out")
    w = {name: weights(1)(importances[0][name], importances[1][name]) for name in tensors[0]}
    right = expected(tensors[0], tensors[1], tensors[2], 0.9, w)
    assert_equal(tmp_path / "out", right)
    apply(*paths, *folders, **settings, common_rows=True, in_place=True)
    assert_equal(paths[0], right)


def test_only_a_vocabulary_may_be_resized(tmp_path: Path) -> None:
    model = draw_role(37, 0)
    for name, shape in ((INNER, (6, 9)), (EMBED, (37, 6)), (EMBED, (37,))):
        other = write_checkpoint(tmp_path / f"{name} {shape}", model | {name: draw(shape)})
        base = write_checkpoint(tmp_path / f"base {name} {shape}", model)
        with pytest.raises(InputError, match="these are not of one model"):
            apply(base, base, other, rule="tv", common_rows=True, out=tmp_path / "out")


def test_rows_that_only_tuned_has_are_no_task_vector(tmp_path: Path) -> None:
    base = draw_role(37, 0)
    tuned = {name: torch.cat([of, draw((3, *of.shape[1:]))]) if name != INNER else of for name, of in base.items()}
    model = write_checkpoint(tmp_path / "model", draw_role(37, 1))
    paths = [write_checkpoint(tmp_path / role, of) for role, of in (("base", base), ("tuned", tuned))]
    with pytest.raises(InputError, match="so the task vector is zero"):
        apply(model, *paths, rule="tv", common_rows=True, out=tmp_path / "out")


@contextmanager
def stopped_before_the_first_byte_is_changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from perta_fast.subtraction.in_place import Segment  # type: ignore[attr-defined]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Segment, "apply", stop)
        yield


def test_a_stopped_run_is_finished_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, tensors = write(tmp_path, (45, 40, 43))
    with stopped_before_the_first_byte_is_changed(monkeypatch):
        apply(*paths, rule="tv", common_rows=True, in_place=True, progress=False)
    resume(paths[0])
    assert_equal(paths[0], expected(tensors[0], tensors[1], tensors[2], 1.0))
    assert {row.kept_rows for row in Report.load(paths[0]).tensors} == {0, 5}


def write_models(folder: Path, sizes: tuple[int, int, int], tied: bool) -> list[Path]:
    """model, base and tuned as transformers saves them, and the data."""
    paths = []
    for seed, (role, rows) in enumerate(zip(("model", "base", "tuned"), sizes, strict=True)):
        model = llama(0, tie_word_embeddings=tied)
        model.resize_token_embeddings(rows, mean_resizing=False)
        nudge_(model, seed)
        model.save_pretrained(folder / role)
        tokenizer().save_pretrained(folder / role)
        paths.append(folder / role)
    return paths


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("at", ["base", "model"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sizes", [(308, 300, 304), (300, 308, 300)])
@pytest.mark.usefixtures("larger_chunks")
def test_unlearn(at: Any, stream: bool, tied: bool, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    model, base, tuned = write_models(tmp_path, sizes, tied)
    data = [write_lines(tmp_path / f"{role}.jsonl", rows) for role, rows in (("forget", FORGET), ("retain", RETAIN))]
    with pytest.raises(InputError, match="common_rows"):
        unlearn(model, base, tuned, *data, at=at, stream=stream, out=tmp_path / "out", lam=1.0, rule="fisher")
    unlearn(
        *(model, base, tuned, *data), rule="grad", at=at, stream=stream, common_rows=True, out=tmp_path / "out",
        save_importance=tmp_path / "kept", lam=0.8, check=False, progress=False,
    )  # fmt: skip
    subject = {"base": base, "model": model}[at]
    kept = [read_checkpoint(tmp_path / "kept" / role) for role in ("forget", "retain")]
    assert {name: of.shape for name, of in kept[0].items()} == {
        name: of.shape for name, of in read_checkpoint(subject).items()
    }
    tensors = [read_checkpoint(path) for path in (model, base, tuned)]
    w = {name: weights(1)(kept[0][name], kept[1][name]) for name in tensors[0]}
    assert_equal(tmp_path / "out", expected(tensors[0], tensors[1], tensors[2], 0.8, w))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] == sizes[0]
    assert not verify(tmp_path / "out", full=True, progress=False).problems


@pytest.mark.parametrize("sizes", [(308, 300, 304), (300, 308, 300)])
@pytest.mark.parametrize("rule", ["tv", "grad"])
@pytest.mark.usefixtures("larger_chunks")
def test_a_live_module_and_a_sweep_as_the_files(sizes: tuple[int, int, int], rule: str, tmp_path: Path) -> None:
    paths = write_models(tmp_path, sizes, tied=False)
    data = [write_lines(tmp_path / f"{role}.jsonl", rows) for role, rows in (("forget", FORGET), ("retain", RETAIN))]
    importances: list[Importance] = []
    if rule == "grad":
        for role, file in zip(("forget", "retain"), data, strict=True):
            importances.append(estimate_importance(paths[1], file, "grad", out=tmp_path / role))
    settings: dict[str, Any] = {"rule": rule, "lam": 0.8}
    apply(*paths, *importances, **settings, common_rows=True, out=tmp_path / "out")
    module = AutoModelForCausalLM.from_pretrained(paths[0])
    with pytest.raises(InputError, match="common_rows"):
        apply_to_module_(module, *paths[1:], *importances, **settings)
    apply_to_module_(module, *paths[1:], *importances, **settings, common_rows=True)
    module.save_pretrained(tmp_path / "live")
    assert_equal(tmp_path / "live", read_checkpoint(tmp_path / "out"))
    with pytest.raises(InputError, match="common_rows"):
        sweep(*paths, *data, rule=rule, lams=[0.8])
    shutil.copytree(tmp_path / "out", tmp_path / "gold")  # what a sweep chooses is then what apply writes
    sweep(
        *(*paths, *data), rule=rule, lams=[0.8], common_rows=True, gold=tmp_path / "gold", select="closest",
        out=tmp_path / "sweep", checkpoint=tmp_path / "chosen",
    )  # fmt: skip
    assert_equal(tmp_path / "chosen", read_checkpoint(tmp_path / "out"))


def write_resized_adapter(folder: Path, rows: int, targets: list[str], whole: list[str] | None = None) -> None:
    """An adapter to a base of 300 rows, which was resized before it was tuned; and what peft merges it to."""
    from peft import LoraConfig, get_peft_model

    module = AutoModelForCausalLM.from_pretrained(folder / "base")
    module.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights="gaussian", modules_to_save=whole
    )
    adapted = get_peft_model(module, config)
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        plain = name.endswith((EMBED, HEAD)) and "embed_tokens" not in targets
        if parameter.requires_grad or plain:
            parameter.data.add_(draw(tuple(parameter.shape), seed=number) * 0.05)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")


@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_with_more_rows_is_merged_with_a_base_that_the_message_makes(
    whole: list[str] | None, tmp_path: Path
) -> None:
    write_models(tmp_path, (300, 300, 300), tied=False)
    write_resized_adapter(tmp_path, 304, ["q_proj"], whole)
    with pytest.raises(
        InputError, match=r"was resized\. Give base with as many rows as the adapter has, made with: "
    ) as caught:
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "common_rows" not in str(caught.value)
    run_advice(str(caught.value))
    merge(tmp_path / "base-resized", tmp_path / "adapter", tmp_path / "out", progress=False)
    found, right = (read_checkpoint(tmp_path / name) for name in ("out", "merged"))
    for name in right:
        torch.testing.assert_close(found[name], right[name].to(found[name].dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_an_embedding_with_more_rows_is_not_merged(tmp_path: Path) -> None:
    """But by peft, as the message says."""
    write_models(tmp_path, (300, 300, 300), tied=False)
    write_resized_adapter(tmp_path, 304, ["embed_tokens", "lm_head", "q_proj"])
    with pytest.raises(InputError, match="merge it with peft"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    from peft import PeftModel

    module = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    module.resize_token_embeddings(304, mean_resizing=False)
    merged: Any = PeftModel.from_pretrained(module, tmp_path / "adapter").merge_and_unload()
    right = read_checkpoint(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, right[name].to(tensor.dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [304, 296, 32])
@pytest.mark.parametrize(
    ("targets", "whole"),
    [(["q_proj"], None), (["q_proj"], ["embed_tokens", "lm_head"]), (["embed_tokens", "lm_head", "q_proj"], None)],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("larger_chunks")
def test_an_adapter_that_was_trained_on_a_resized_embedding(
    targets: list[str], whole: list[str] | None, rows: int, tmp_path: Path
) -> None:
    """It holds the embedding in full: as it was tuned, or as it is beside its factors."""
    model, base, _ = write_models(tmp_path, (300, 300, 300), tied=False)
    write_resized_adapter(tmp_path, rows, targets, whole)
    with pytest.raises(InputError, match="common_rows"):
        apply(model, base, tmp_path / "adapter", rule="tv", out=tmp_path / "out")
    apply(model, base, tmp_path / "adapter", rule="tv", common_rows=True, out=tmp_path / "out")
    apply(model, base, tmp_path / "merged", rule="tv", common_rows=True, out=tmp_path / "expected")
    found, right, theta = (read_checkpoint(path) for path in (tmp_path / "out", tmp_path / "expected", model))
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=0, atol=1e-6)
        changed = bool((found[name][: min(rows, 300)] != theta[name][: min(rows, 300)]).any())
        assert changed == (name in (EMBED, HEAD) or "q_proj" in name)
    assert same_bytes(found[EMBED][min(rows, 300) :], theta[EMBED][min(rows, 300) :])
    assert not verify(tmp_path / "out", full=True, progress=False).problems
    module = AutoModelForCausalLM.from_pretrained(model)
    apply_to_module_(module, base, tmp_path / "adapter", rule="tv", common_rows=True)
    module.save_pretrained(tmp_path / "live")
    assert_equal(tmp_path / "live", found)
    apply(model, base, tmp_path / "adapter", rule="tv", common_rows=True, in_place=True)
    assert_equal(model, found)


def write_tokens_adapter(folder: Path, config: Any, rows: int, saved: str, tied: bool) -> None:
    """An adapter that was tuned after tokens were added to a base of 300, and what peft merges it to.

    saved: what was saved of the resized embedding: "beside" the adapter, with the "base", or "nothing".
    """
    from peft import get_peft_model

    module = AutoModelForCausalLM.from_pretrained(folder / "base")
    module.resize_token_embeddings(rows, mean_resizing=False)
    if saved == "base":
        module.save_pretrained(folder / "base")
        module = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(module, config)
    for number, parameter in enumerate(adapted.parameters()):
        if parameter.requires_grad:
            parameter.data.add_(draw(tuple(parameter.shape), seed=number) * 0.05)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False if saved == "nothing" else "auto")
    adapted.merge_and_unload().save_pretrained(folder / "merged")


def tokens_config(kind: str, rows: int) -> Any:
    from peft import LoHaConfig, LoraConfig, TrainableTokensConfig

    tokens, targets = [5, min(301, rows - 1)], ["q_proj"]
    lora: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    return {
        "tokens": lambda: LoraConfig(**lora, trainable_token_indices=tokens),
        "tokens by module": lambda: LoraConfig(**lora, trainable_token_indices={"embed_tokens": tokens}),
        "tokens of both": lambda: LoraConfig(
            **lora, trainable_token_indices={"embed_tokens": tokens, "lm_head": tokens}
        ),
        "TRAINABLE_TOKENS": lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=tokens),
        "DoRA": lambda: LoraConfig(**lora | {"target_modules": [*targets, "embed_tokens"]}, use_dora=True),
        "DoRA of the head": lambda: LoraConfig(**lora | {"target_modules": [*targets, "lm_head"]}, use_dora=True),
        "LoHa of the head": lambda: LoHaConfig(target_modules=[*targets, "lm_head"]),
    }[kind]()


TOKENS = ("tokens", "tokens by module", "tokens of both", "TRAINABLE_TOKENS")


@pytest.mark.parametrize(
    ("kind", "saved", "tied"),
    [
        *itertools.product(TOKENS, ("beside",), (False, True)),
        *itertools.product(("tokens",), ("base", "nothing"), (False, True)),
        *itertools.product(("DoRA", "DoRA of the head", "LoHa of the head"), ("beside",), (False,)),
    ],
)
@pytest.mark.parametrize("sizes", [(304, 300), (304, 308), (296, 300)])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("larger_chunks")
def test_trained_tokens_and_others_that_peft_merges(
    kind: str, saved: str, tied: bool, sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the merged checkpoint, to the bit, except where a product of factors is not rounded."""
    rows, of_model = sizes
    model, base, _ = write_models(tmp_path, (of_model, 300, 300), tied)
    write_tokens_adapter(tmp_path, tokens_config(kind, rows), rows, saved, tied)
    before = fingerprint(tmp_path)
    if not (rows == 296 and saved == "nothing" and of_model == 300):  # nothing there says that it was resized
        with pytest.raises(InputError, match="common_rows"):
            apply(model, base, tmp_path / "adapter", rule="tv", out=tmp_path / "out")
    assert fingerprint(tmp_path) == before
    how: dict[str, Any] = {"rule": "tv", "lam": 0.7, "common_rows": True, "progress": False}
    for role in ("adapter", "merged"):
        apply(model, base, tmp_path / role, out=tmp_path / f"out-{role}", **how)
    found, right, theta = (read_checkpoint(path) for path in (tmp_path / "out-adapter", tmp_path / "out-merged", model))
    for name in right:
        if "q_proj" in name and "DoRA" not in kind and "LoHa" not in kind:
            torch.testing.assert_close(found[name], right[name], rtol=1e-6, atol=1e-7)
        else:
            assert same_bytes(found[name], right[name]), name
    tuned_matrix = HEAD if "head" in kind else EMBED
    assert not same_bytes(found[tuned_matrix], theta[tuned_matrix])
    common = min(rows, read_checkpoint(base)[EMBED].shape[0])
    assert same_bytes(found[tuned_matrix][common:], theta[tuned_matrix][common:])
    assert not verify(tmp_path / "out-adapter", full=True, progress=False).problems
    module = AutoModelForCausalLM.from_pretrained(model)
    apply_to_module_(module, base, tmp_path / "adapter", rule="tv", lam=0.7, common_rows=True)
    module.save_pretrained(tmp_path / "live")
    assert_equal(tmp_path / "live", found)
    with stopped_before_the_first_byte_is_changed(monkeypatch):
        apply(model, base, tmp_path / "adapter", in_place=True, **how)
    resume(model, progress=False)
    assert_equal(model, found)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("larger_chunks")
def test_a_tied_model_of_another_size_can_be_untied_as_the_message_says(tmp_path: Path) -> None:
    model, base, _ = write_models(tmp_path, (308, 300, 300), tied=True)
    write_tokens_adapter(tmp_path, tokens_config("DoRA", 304), 304, "beside", tied=True)
    how: dict[str, Any] = {"rule": "tv", "common_rows": True, "progress": False}
    with pytest.raises(InputError, match="untie that with") as caught:
        apply(model, base, tmp_path / "adapter", out=tmp_path / "out", **how)
    run_advice(str(caught.value))
    tuned = tuned_model_of_resized(base, tmp_path / "adapter", 304)
    apply(tmp_path / "model-untied", base, tmp_path / "adapter", out=tmp_path / "out", **how)
    found, theta, of_base = (read_checkpoint(path) for path in (tmp_path / "out", tmp_path / "model-untied", base))
    right = theta[EMBED][:300] - (tuned[:300] - of_base[EMBED])
    torch.testing.assert_close(found[EMBED][:300], right, rtol=0, atol=1e-6)
    assert same_bytes(found[EMBED][300:], theta[EMBED][300:])
    assert same_bytes(found[HEAD], theta[HEAD])


def tuned_model_of_resized(base: Path, adapter: Path, rows: int) -> Tensor:
    """The input embedding of the tuned model, which peft loads to a base that was resized as in the training."""
    from peft import PeftModel

    module = AutoModelForCausalLM.from_pretrained(base)
    module.resize_token_embeddings(rows, mean_resizing=False)
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())  # merged by itself
    merged = PeftModel.from_pretrained(module, adapter).merge_and_unload()
    weight: Tensor = merged.get_input_embeddings().weight.detach()
    return weight


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, tensors = write(tmp_path, (40, 37, 37))
    command = ["apply", "--rule", "tv", "--lam", "1", "--out", tmp_path / "out"]
    for role, path in zip(("model", "base", "tuned"), paths, strict=True):
        command += [f"--{role}", path]
    assert cli.main([*map(str, command)]) == 2
    assert "add" not in capsys.readouterr().out
    assert cli.main([*map(str, command), "--common-rows"]) == 0
    assert "rows kept as the model has them" in capsys.readouterr().out
    assert_equal(tmp_path / "out", expected(tensors[0], tensors[1], tensors[2], 1.0))


def test_kept_rows_that_were_changed_are_found(tmp_path: Path) -> None:
    paths, _ = write(tmp_path, (40, 37, 37))
    apply(*paths, rule="tv", common_rows=True, out=tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    for shard in (tmp_path / "copy").glob("*.safetensors"):
        of = load_file(shard)
        if EMBED in of:
            of[EMBED][38, 2] += 1
            save_file(of, shard)
    assert verify(tmp_path / "copy", full=True, progress=False).problems

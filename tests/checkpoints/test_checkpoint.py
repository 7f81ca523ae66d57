"""Opening model directories: single files, shards, hub caches, and everything that must be refused by name."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.tied import tied_partner
from perta_fast.errors import InputError
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes, write_checkpoint, write_raw
from tests.support.children import run_child
from tests.support.models import Job, llama, tokenizer

TENSORS = {
    "a": draw((3, 4)),
    "b": draw((5,), torch.bfloat16, 1),
    "c": draw((), torch.float16, 2),
    "d": draw((2, 0), torch.float32),
    "e": torch.arange(6),
}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_holds_what_the_library_wrote(shards: int, tmp_path: Path) -> None:
    opened = Checkpoint.open(write_checkpoint(tmp_path / "m", TENSORS, shards))
    assert len(opened.shards) == shards
    assert opened.tensors.keys() == TENSORS.keys()
    assert opened.size == sum(tensor.nbytes for tensor in TENSORS.values())
    assert sorted(opened.files()) == sorted((tmp_path / "m").iterdir())
    for name in "abcd":
        assert same_bytes(opened.tensor(name), TENSORS[name])


def test_opens_what_transformers_wrote(job: Job) -> None:
    opened = Checkpoint.open(job.model)
    expected = read_checkpoint(job.model)
    assert len(opened.shards) > 1
    assert opened.tensors.keys() == expected.keys()
    assert all(same_bytes(opened.tensor(name), tensor) for name, tensor in expected.items())


def test_follows_links_into_a_hub_cache(tmp_path: Path) -> None:
    blobs = write_checkpoint(tmp_path / "blobs", TENSORS, 2)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    opened = Checkpoint.open(snapshot)
    assert same_bytes(opened.tensor("a"), TENSORS["a"])
    assert same_bytes(opened.tensor("b"), TENSORS["b"])


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    assert same_bytes(Checkpoint.open(folder).tensor("a"), TENSORS["a"])


@pytest.mark.parametrize("name", ["e", "z"])
def test_tensors_that_cannot_be_given_are_named(name: str, tmp_path: Path) -> None:
    opened = Checkpoint.open(write_checkpoint(tmp_path / "m", TENSORS))
    with pytest.raises(InputError, match=f"tensor {name}"):
        opened.tensor(name)


def test_equal_compares_type_shape_and_bytes(tmp_path: Path) -> None:
    a = draw((4, 6))
    other = a.clone()
    other[3, 5] += 1
    opened = Checkpoint.open(
        write_checkpoint(
            tmp_path / "m",
            {"a": a, "same": a.clone(), "other": other, "shape": a.reshape(6, 4), "type": a.view(torch.int32)},
            shards=2,
        )
    )
    assert opened.equal("a", "same")
    assert not any(opened.equal("a", name) for name in ("other", "shape", "type"))


@pytest.mark.parametrize(
    ("name", "others", "partner"),
    [
        ("lm_head.weight", ["model.embed_tokens.weight", "x"], "model.embed_tokens.weight"),
        ("model.embed_tokens.weight", ["lm_head.weight", "x"], "lm_head.weight"),
        ("lm_head.weight", ["transformer.wte.weight"], "transformer.wte.weight"),
        ("embed_out.weight", ["gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        ("lm_head.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], None),
        ("lm_head.weight", ["x"], None),
        ("x", ["lm_head.weight", "model.embed_tokens.weight"], None),
    ],
)
def test_tied_partner(name: str, others: list[str], partner: str | None) -> None:
    assert tied_partner(name, dict.fromkeys(others)) == partner


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def vacated(path: Path) -> Path:
    path.unlink()
    return path


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "index is not JSON": (lambda m: (m / INDEX).write_text("{"), f"{INDEX}: is not JSON"),
    "index is not text": (lambda m: (m / INDEX).write_bytes(b"\xff\xfe{"), f"{INDEX}: is not JSON"),
    "index is nested too deeply": (lambda m: (m / INDEX).write_text("[" * 99999), f"{INDEX}: is not JSON"),
    "index is a list": (lambda m: (m / INDEX).write_text("[]"), f"{INDEX}: has no weight_map"),
    "index without weight_map": (lambda m: (m / INDEX).write_text("{}"), f"{INDEX}: has no weight_map"),
    "empty weight_map": (lambda m: (m / INDEX).write_text('{"weight_map": {}}'), f"{INDEX}: has no weight_map"),
    "absent shard": (lambda m: (m / SECOND).unlink(), f"{INDEX}: names the shard {SECOND}, which is not there"),
    "dangling link": (lambda m: vacated(m / SECOND).symlink_to("gone"), f"{SECOND}: cannot be read"),
    "truncated shard": (lambda m: os.truncate(m / SECOND, (m / SECOND).stat().st_size - 3), f"{SECOND}: is truncated"),
    "shard is a directory": (lambda m: vacated(m / SECOND).mkdir(), f"{SECOND}: cannot be read: Is a directory"),
    "tensor only in the index": (
        lambda m: change_index(m, lambda weights: weights.update(z=FIRST)),
        f"{INDEX}: puts tensor z into {FIRST}, which does not hold it",
    ),
    "single file beside an index of others": (
        lambda m: write_raw(m / "model.safetensors", {}),
        f"holds model.safetensors and {INDEX}, which does not name it",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_directories_are_refused_by_name(case: str, tmp_path: Path) -> None:
    damage, reason = BAD[case]
    folder = write_checkpoint(tmp_path / "m", TENSORS, 2)
    damage(folder)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).startswith(str(folder))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x\0.safetensors", "x.bin", 3]
)
def test_an_index_cannot_reach_outside_its_directory(shard: object, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "outside", TENSORS)
    folder = write_checkpoint(tmp_path / "m", TENSORS, 2)
    change_index(folder, lambda weights: weights.update(a=shard))  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"tensor a: shard .* is not the name of a safetensors file"):
        Checkpoint.open(folder)


RIGHT = {"a": FIRST, "b": SECOND, "c": FIRST, "d": SECOND, "e": FIRST}
texts = st.text(max_size=300)
shard_names = st.sampled_from([FIRST, SECOND]) | texts.map("{}.safetensors".format) | texts
weight_maps = st.dictionaries(st.sampled_from("abcde") | texts, shard_names, max_size=2).map(RIGHT.__or__)
any_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given((weight_maps | any_json).map(lambda weights: {"weight_map": weights}) | any_json)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_an_index_of_what_the_shards_hold_is_taken(tmp_path: Path, index: object) -> None:
    folder = tmp_path / "m"
    if not folder.exists():
        write_checkpoint(folder, TENSORS, 2)
    (folder / INDEX).write_text(json.dumps(index))
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(weights, dict) and weights.keys() == RIGHT.keys() and set(weights.values()) == {FIRST, SECOND}:
        assert Checkpoint.open(folder).tensors.keys() == TENSORS.keys()
        return
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value)


@given(st.binary(max_size=80))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_index_of_random_bytes_is_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(InputError, match=INDEX):
        Checkpoint.open(tmp_path)


def test_missing_directory_says_how_to_get_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such directory; .* hf download"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_no_directory_can_have_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        Checkpoint.open(name)


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {})
    with pytest.raises(InputError, match="is not a directory; give the one that holds"):
        Checkpoint.open(path)


@pytest.mark.parametrize("stem", ["model", "importance"])
def test_a_directory_without_weights_says_what_it_lacks(stem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"holds neither {stem}\.safetensors nor {stem}\.safetensors\.index"):
        Checkpoint.open(tmp_path, stem)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_refused_by_name(weights: str, tmp_path: Path) -> None:
    for name in ("adapter_config.json", weights, "training_args.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="holds a PEFT adapter, which only tuned can be"):
        Checkpoint.open(tmp_path)


def test_what_a_trainer_leaves_is_not_taken_for_pickled_weights(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="holds neither"):
        Checkpoint.open(tmp_path)


@pytest.mark.slow
def test_the_conversion_command_in_the_message_converts(tmp_path: Path) -> None:
    folder = tmp_path / "it's $pickled"
    model = llama(num_hidden_layers=1)
    model.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    before = fingerprint(folder)
    with pytest.raises(InputError, match=r"holds pickled weights \(pytorch_model\.bin\)") as caught:
        Checkpoint.open(folder)
    command = str(caught.value).split("convert them with: ")[1]
    assert command == conversion_command(folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run_child(["sh", "-c", command], check=True, env=os.environ | {"PATH": path})
    assert fingerprint(folder) == before
    target = Path(f"{folder}-safetensors")
    opened = Checkpoint.open(target)
    for name, tensor in model.state_dict().items():
        assert same_bytes(opened.tensor(name), tensor)
    assert AutoModelForCausalLM.from_pretrained(target).config.vocab_size == model.config.vocab_size
    assert (target / "tokenizer.json").exists()

"""The ratio of two importances: its numbers, how far w moves by its rounding, and its files."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from perta_fast import Event, Importance, ImportanceRatio, InputError, RunError
from perta_fast.cli import main
from perta_fast.importance import ratio as ratios
from perta_fast.importance import store
from perta_fast.importance.ratio import located, ratio_of
from perta_fast.ops import reference
from perta_fast.progress import Bar
from perta_fast.rules import Rescaling
from perta_fast.streaming.forecast.trial import LiveBytes
from tests.importance.test_store import METADATA, TENSORS, reads_recorded
from tests.support.checkpoints import draw, fingerprint, read_checkpoint, same_bytes

INFINITY = math.inf
BF16_MAX = torch.finfo(torch.bfloat16).max
RETAIN = {name: draw(tuple(tensor.shape), seed=40 + k) for k, (name, tensor) in enumerate(TENSORS.items())}
OTHER = replace(METADATA, data_hash="cd" * 32, sample_count=99, system_prompt=METADATA.system_prompt, date=None)


def pair() -> tuple[Importance, Importance]:
    return Importance(dict(TENSORS), METADATA), Importance(dict(RETAIN), OTHER)


def saved_pair(folder: Path) -> tuple[Path, Path]:
    forget, retain = pair()
    forget.save(folder / "forget")
    retain.save(folder / "retain")
    return folder / "forget", folder / "retain"


@pytest.mark.parametrize(
    ("forget", "retain", "ratio"),
    [
        (2.0, 3.0, 1.5),
        (-2.0, 3.0, 1.5),  # mean gradients have a sign
        (2.0, -3.0, 1.5),
        (1.0, 0.0, 0.0),
        (0.0, 0.0, INFINITY),
        (0.0, 1.0, INFINITY),
        (-0.0, 1.0, INFINITY),
        (1e-45, 1e-5, BF16_MAX),  # 7e39, beyond all types, but there is a forget importance
        (1e-45, 1e-45, 1.0),
        (3e38, 1e-30, 0.0),  # 3e-69
        (1.0, 1.0 + 2**-8, 1.0),  # a tie, to the even neighbour
        (1.0, 1.0 + 3 * 2**-8, 1.0 + 2**-6),
        (1.0, 3.3961776e38, BF16_MAX),  # would round to infinity
    ],
)
def test_numbers(forget: float, retain: float, ratio: float) -> None:
    found = ratio_of(torch.tensor([forget]), torch.tensor([retain]), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.item() == ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_ratio_is_made_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits are those of the whole, and double precision is there for a part alone."""
    monkeypatch.setattr(ratios, "_DOUBLE", 100)
    forget, retain = (draw((50, 101), seed=seed) for seed in (1, 2))
    forget[0, :3], retain[0, 1] = 0.0, 0.0
    with LiveBytes([forget, retain]) as live:
        found = ratio_of(forget, retain, dtype)
    whole = (retain.double() / forget.double()).abs().clamp(max=torch.finfo(dtype).max)
    assert same_bytes(found, torch.where(forget == 0, torch.inf, whole).to(dtype))
    assert live.peak <= found.nbytes + 48 * 100
    assert ratio_of(forget[0, 0], retain[0, 0], dtype).shape == ()
    assert ratio_of(forget[:0], retain[:0], dtype).shape == (0, 101)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 2.0, 1.7]), st.sampled_from([0.1, 1.0, 16.0]))
def test_rounding_moves_w_by_no_more_than_is_said(seed: int, p: float, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (10 ** torch.empty(2000).uniform_(-9, 0, generator=generator) for _ in range(2))
    forget[::9] = retain[::11] = 0
    how = Rescaling(1.0, p, alpha)
    w = reference.weights(forget, retain, how).double()
    moved = reference.weights_of_ratio(ratio_of(forget, retain, torch.bfloat16), how).double() - w
    bound = p * 2**-8 * w * (1 - w)
    assert bool((moved.abs() <= bound * (1 + p * 2**-8) + 4 * torch.finfo(torch.float32).eps * w).all())


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shard_bytes", [170, 1 << 20])
def test_what_goes_in_comes_out(
    stored: bool, dtype: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(ratios, "_CHUNK", 4)
    given_pair = saved_pair(tmp_path) if stored else pair()
    made = ImportanceRatio.of(*given_pair, dtype=dtype)
    made.save(tmp_path / "ratio")
    assert made.directory == tmp_path / "ratio"
    loaded = ImportanceRatio.load(tmp_path / "ratio")
    assert list(loaded.tensors) == list(TENSORS) and len(made.tensors) == len(TENSORS)
    for name, forget in TENSORS.items():
        expected = ratio_of(forget, RETAIN[name], getattr(torch, dtype))
        assert same_bytes(loaded.tensors[name], expected)
        assert same_bytes(made.tensors[name], expected)
    assert loaded.metadata == made.metadata == {"forget": METADATA, "retain": OTHER}
    assert loaded.estimator == "grad"
    again = ImportanceRatio({name: loaded.tensors[name] for name in loaded.tensors}, loaded.metadata)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").joinpath(next((tmp_path / "ratio").glob("*.safetensors")).name).exists()
    assert read_checkpoint(tmp_path / "again").keys() == TENSORS.keys()
    for path in (tmp_path / "ratio").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_loaded_ratio_can_be_saved_elsewhere(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ImportanceRatio.of(*pair(), dtype=dtype).save(tmp_path / "first")
    read = reads_recorded(monkeypatch)
    ImportanceRatio.load(tmp_path / "first").save(tmp_path / "second")
    assert not read  # but in chunks
    names = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == names


@pytest.mark.parametrize("stored", [False, True])
def test_progress(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes: 4 read of each side, if it lies in files, and 2 written."""
    monkeypatch.setattr(ratios, "_CHUNK", 4)
    events: list[Event] = []
    ImportanceRatio.of(*(saved_pair(tmp_path) if stored else pair())).save(tmp_path / "out", progress=events.append)
    total = (10 if stored else 2) * sum(tensor.numel() for tensor in TENSORS.values())
    assert events[0] == Event("ratio", 0, total, "B")
    assert events[-1] == Event("ratio", total, total, "B")


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_of_the_command(quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        ratios, "Bar", lambda total, phase, progress: drawn.append(progress) or Bar(total, phase, False)
    )
    forget, retain = saved_pair(tmp_path)
    command = ["ratio", "--forget-importance", forget, "--retain-importance", retain, "--out", tmp_path / "out"]
    assert main([*map(str, command), *(["--quiet"] if quiet else [])]) == 0
    assert drawn == [not quiet]


def test_a_side_that_changes_meanwhile(tmp_path: Path) -> None:
    forget, retain = saved_pair(tmp_path)
    ratio = ImportanceRatio.of(forget, retain)
    (shard,) = retain.glob("*.safetensors")
    os.utime(shard, ns=(0, 0))
    with pytest.raises(RunError, match=f"{shard}: has changed during the run; run the same command again"):
        ratio.save(tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forget", "retain"]


@pytest.mark.parametrize("below", ["forget", "forget/out", "absent/../retain/a/b"])
def test_no_output_in_an_input(below: str, tmp_path: Path) -> None:
    ratio = ImportanceRatio.of(*saved_pair(tmp_path))
    before = fingerprint(tmp_path)
    with pytest.raises(InputError, match=r"(lies in|is or contains) the input .*; choose another output directory"):
        ratio.save(tmp_path / below, overwrite=True)
    assert fingerprint(tmp_path) == before


def test_an_importance_in_bfloat16(tmp_path: Path) -> None:
    pair()[0].save(tmp_path / "saved", dtype="bfloat16")
    loaded = Importance.load(tmp_path / "saved")
    assert loaded.metadata == METADATA
    for name, tensor in TENSORS.items():
        assert same_bytes(loaded.tensors[name], tensor.bfloat16())
    with pytest.raises(InputError, match="'float16'; it must be float32 or bfloat16"):
        pair()[0].save(tmp_path / "other", dtype="float16")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [math.nan, INFINITY])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_values_that_are_not_finite_are_refused(side: str, value: float, tmp_path: Path) -> None:
    importances = dict(zip(("forget", "retain"), pair(), strict=True))
    tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in importances[side].tensors.items()}
    tensors["b.weight"][1, 2] = value
    importances[side].tensors = tensors
    importances[side].save(tmp_path / "saved")
    importances[side] = Importance.load(tmp_path / "saved")
    with pytest.raises(InputError, match=rf"{tmp_path / 'saved'}: tensor b\.weight has NaN or infinite importance"):
        ImportanceRatio.of(importances["forget"], importances["retain"]).save(tmp_path / "ratio")
    assert not (tmp_path / "ratio").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, metadata=replace(OTHER, estimator="empirical-fisher")), "estimator grad.*empirical"),
        (lambda r: replace(r, metadata=replace(OTHER, system_prompt="x")), "system prompt of the forget importance"),
        (lambda r: replace(r, tensors={"a.bias": RETAIN["a.bias"]}), r"the retain importance has no tensor a\.weight"),
        (lambda r: replace(r, tensors=RETAIN | {"c": draw((2,))}), r"the forget importance has no tensor c of"),
        (lambda r: replace(r, tensors=RETAIN | {"a.bias": draw((6,))}), r"no tensor a\.bias of shape \[7\]"),
    ],
)
def test_importances_that_do_not_belong_together(change: Callable[[Importance], Importance], message: str) -> None:
    forget, retain = pair()
    with pytest.raises(InputError, match=message):
        ImportanceRatio.of(forget, change(retain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "perta-importance"}, "is not a ratio of importances"),
        ({"format_version": "2"}, "later version"),
        ({"retain_estimator": "empirical-fisher"}, "different estimators; make it again"),
        ({"retain_estimator": "other", "forget_estimator": "other"}, "is not a ratio of importances"),
        ({"retain_sample_count": "many"}, "counts that are not whole numbers"),
        ({"forget_data_hash": None}, "is not a ratio of importances"),
    ],
)
def test_files_that_are_no_ratio(change: dict[str, str | None], message: str, tmp_path: Path) -> None:
    ImportanceRatio.of(*pair()).save(tmp_path / "ratio")
    path = tmp_path / "ratio" / "ratio.safetensors"
    table = ratios.ratio_table({"forget": store.as_strings(METADATA), "retain": store.as_strings(OTHER)}) | change
    save_file(load_file(path), path, {key: value for key, value in table.items() if value is not None})
    with pytest.raises(InputError, match=f"{path.parent}.*{message}"):
        ImportanceRatio.load(tmp_path / "ratio")


def test_what_lies_in_a_directory(tmp_path: Path) -> None:
    forget, retain = saved_pair(tmp_path / "pair")
    ImportanceRatio.of(forget, retain).save(tmp_path / "ratio")
    assert located(tmp_path / "ratio") == {"ratio": tmp_path / "ratio"}
    assert located(tmp_path / "pair") == {"forget_importance": forget, "retain_importance": retain}
    with pytest.raises(InputError, match="holds one importance; give two"):
        located(forget)
    with pytest.raises(InputError, match="holds neither a ratio nor"):
        located(tmp_path)

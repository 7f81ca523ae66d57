"""The files that others may have made or damaged, and the ways in which the package reads them.

For a new kind of file, add an entry to ``TARGETS``.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hypothesis.strategies import SearchStrategy

from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.rows import load_rows
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.importance.store import Importance
from perta_fast.records.recipe import Setting, read_recipe
from perta_fast.records.report import DataRecord, Report
from perta_fast.reporting.evidence import read_scores
from perta_fast.runs.apply import apply
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.sweeping.results import Sweep
from tests.fuzz import mutation
from tests.support.checkpoints import draw, write_checkpoint, write_importance
from tests.support.inputs import write_inputs
from tests.support.models import FORGET, write_lines

FIRST_SHARD = "model-00001-of-00002.safetensors"
RECIPE = """# A run.
model: model
base: ./base
tuned: "tuned"
forget: data.jsonl
retain: data.jsonl
rule: grad
lam: 0.5
batch-size: 4
stream: true
p:
out: 'new'
"""
SCORES = {
    "model": "model",
    "metrics": {"forget_loss": {"agg_value": 2.5}, "retain_loss": {"agg_value": None, "value_by_index": {}}},
    "data": {"forget": {"blake3": "0" * 64, "path": "data.jsonl", "samples": 3}},
}
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The author."}]


@dataclass(frozen=True)
class Target:
    """One file of a finished run.

    file: its path in the folder of ``write_run``. damage: draws damaged bytes for it. read: reads the damaged file at
    a path as the package does; PertaError is a refusal, AssertionError a wrong result. commands: those of
    ``COMMANDS`` that read it.
    """

    file: str
    damage: Callable[[bytes], SearchStrategy[bytes]]
    read: Callable[[Path], None]
    commands: tuple[str, ...] = ()


# Command lines, to run in the folder of ``write_run``.
COMMANDS: dict[str, str] = {
    "inspect model": "inspect --tensors model",
    "inspect forget": "inspect --tensors forget",
    "inspect retain": "inspect --tensors retain",
    "inspect out": "inspect --tensors out",
    "inspect adapter": "inspect --tensors adapter",
    "verify": "verify --quiet --full out",
    "apply adapter": (
        "apply --quiet --threads 1 --model model --base base --tuned adapter --rule tv --lam 0.5 --out ../new"
    ),
    "recipe check": "recipe check run.yaml",
    "apply": (
        "apply --quiet --threads 1 --model model --base base --tuned tuned --forget-importance forget "
        "--retain-importance retain --rule grad --lam 0.5 --out ../new"
    ),
}


def write_run(folder: Path) -> None:
    """Write the inputs of ``perta apply``, some in one file and some in two, its output, and a file of each kind."""
    inputs = write_inputs(folder, shards=2)
    for role, write in (("base", write_checkpoint), ("forget", write_importance)):
        shutil.rmtree(inputs[role])
        write(inputs[role], inputs.tensors[role])
    write_adapter(folder / "adapter")
    write_sweep(folder / "settings")
    (folder / "scores.json").write_text(json.dumps(SCORES))
    write_lines(folder / "data.jsonl", [FORGET[0], {"text": "A text."}, {"messages": TALK}])
    (folder / "run.yaml").write_text(RECIPE)
    apply(*inputs.all, rule="grad", lam=0.5, threads=1, out=folder / "out", progress=False)


def write_adapter(folder: Path) -> None:
    """Write a LoRA adapter of rank 2 on the embedding."""
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    write_checkpoint(folder, {f"{stem}_A": draw((2, 37)), f"{stem}_B": draw((5, 2), seed=1)}, stem="adapter_model")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": {"tokens": 5, "embed_tokens": 4}}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_sweep(folder: Path) -> None:
    """Write the record of a search on two curves; one strength has broken the model, one was skipped."""
    settings = [
        ScoredSetting("", 1.0, 1.0, 0.0, 0.1, 0.2, 0.1, 0.2, 0.0, 1.5),
        ScoredSetting("tv", 1.0, 1.0, 1.0, 2.0, 0.4, 2.0, 0.4, 0.9, 1.5),
        ScoredSetting("tv", 1.0, 1.0, 2.0, math.nan, math.inf, math.nan, math.inf, 1.0, 1.5),
        ScoredSetting("grad", 1.0, 4.0, 8.0, 3.0, 0.3, 3.0, 0.3, 0.9, 1.5),
        ScoredSetting("grad", 1.0, 4.0, 9.0, *[math.nan] * 5, 0.0, skipped=True),
    ]
    described: DataRecord = {"path": "data.jsonl", "blake3": "0" * 64, "samples": 3, "truncated": 0}
    data = dict.fromkeys(("forget", "retain"), described)
    sweep = Sweep(settings, "loss", 0.5, None, "best-forget", {"lams": [1, 2, 8, 9]}, {"model": "model"}, data)
    folder.mkdir()
    replace(sweep, gold=replace(settings[0], forget=6.0, forget_loss=6.0)).save(folder)


def _read_sweep(file: Path) -> None:
    """A sweep that is not refused must have a summary and choose a setting within the limits."""
    sweep = Sweep.read(file)
    assert sweep.summary()
    assert sweep.original in sweep.rows
    assert sum(map(len, sweep.curves().values())) == sum(bool(setting.rule) for setting in sweep.rows)
    best = sweep.best
    assert best is None or best.keeps(sweep.limits)


def _read_scores(file: Path) -> None:
    """Scores that are not refused must be finite numbers by name, or None."""
    (scores,) = read_scores([file])
    assert scores.values
    assert all(value is None or math.isfinite(value) for value in scores.values.values())
    scores.point()


def _read_adapter(file: Path) -> None:
    """An adapter that is not refused must have finite scales, and factors whose product has the stated shape."""
    for update in Adapter.open(file.parent).low_rank.values():
        assert math.isfinite(update.scale)
        b, a = update.factors()
        assert (len(b), a.shape[1]) == update.shape
        assert b.shape[1] == len(a)


def _read_weights(file: Path, stem: str = "model") -> None:
    """A checkpoint that is not refused must be what its headers say; every byte of data belongs to one tensor."""
    checkpoint = Checkpoint.open(file.parent, stem)
    expected = {}
    for path in file.parent.glob("*.safetensors"):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:begin])
        table.pop("__metadata__", None)
        offset = 0
        for entry in sorted(table.values(), key=lambda entry: entry["data_offsets"]):
            assert entry["data_offsets"] == [offset, offset + math.prod(entry["shape"]) * ITEM_SIZES[entry["dtype"]]]
            offset = entry["data_offsets"][1]
        assert begin + offset == len(content)
        for name, entry in table.items():
            first, last = entry["data_offsets"]
            expected[name] = (entry["dtype"], entry["shape"], content[begin + first : begin + last])
    opened = {
        name: (entry.dtype, list(entry.shape), checkpoint.file_of(entry).path.read_bytes()[entry.begin : entry.end])
        for name, entry in checkpoint.tensors.items()
    }
    assert opened == expected


def _read_importance(file: Path) -> None:
    metadata = Importance.load(file.parent).metadata
    _read_weights(file, "importance")
    shard = min(file.parent.glob("*.safetensors")).read_bytes()
    table = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])["__metadata__"]
    assert metadata.sample_count == int(table["sample_count"]) >= 0
    assert (metadata.estimator, metadata.data_hash) == (table["estimator"], table["data_hash"])


def _read_report(file: Path) -> None:
    report = Report.load(file.parent)
    assert report.summary()
    assert contains(asdict(report), json.loads(file.read_bytes()))


def _read_data(file: Path) -> None:
    rows = load_rows(file)
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    assert len(rows) == sum(bool(line.strip()) for line in lines)
    for row in rows:
        assert row.content
        assert contains(json.loads(lines[int(row.where.rsplit(" ", 1)[1]) - 1]), dict(row.content))


def _read_recipe(file: Path) -> None:
    """A recipe that is not refused must hold what YAML's own loader reads, if that can read it."""
    recipe = read_recipe(file)
    try:
        expected = yaml.safe_load(file.read_bytes())
    except ValueError:  # a date like May 35, which the package reads as text
        return
    for name, settings in recipe.sections.items():
        _are_settings(settings, expected.pop(name))
    _are_settings(recipe.settings, expected)


def _are_settings(settings: Mapping[str, Setting], expected: Mapping[Any, Any]) -> None:
    assert len(settings) == sum(value is not None for value in expected.values())
    for key, value in expected.items():
        if isinstance(key, str) and isinstance(value, str | bool):
            assert settings[key].value == value


def contains(whole: Any, part: Any) -> bool:
    """Whether ``whole`` has everything that ``part`` has: equal lists, and dictionaries with at least its entries."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(whole, list) and isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return repr(whole) == repr(part)  # so that NaN equals NaN, and True does not equal 1


TARGETS: dict[str, Target] = {
    "single file": Target("base/model.safetensors", mutation.safetensors, _read_weights, ("apply", "verify")),
    "shard": Target(f"model/{FIRST_SHARD}", mutation.safetensors, _read_weights, ("inspect model", "apply", "verify")),
    "index": Target(
        "model/model.safetensors.index.json", mutation.index, _read_weights, ("inspect model", "apply", "verify")
    ),
    "importance": Target(
        "forget/importance.safetensors", mutation.safetensors, _read_importance, ("inspect forget", "apply", "verify")
    ),
    "shard of an importance": Target(
        "retain/importance-00001-of-00002.safetensors",
        mutation.safetensors,
        _read_importance,
        ("inspect retain", "apply", "verify"),
    ),
    "index of an importance": Target(
        "retain/importance.safetensors.index.json",
        mutation.index,
        _read_importance,
        ("inspect retain", "apply", "verify"),
    ),
    "output shard": Target(f"out/{FIRST_SHARD}", mutation.safetensors, _read_weights, ("inspect out", "verify")),
    "report": Target("out/perta_report.json", mutation.json_document, _read_report, ("inspect out", "verify")),
    "adapter": Target(
        "adapter/adapter_model.safetensors", mutation.safetensors, _read_adapter, ("inspect adapter", "apply adapter")
    ),
    "adapter config": Target(
        "adapter/adapter_config.json", mutation.json_document, _read_adapter, ("inspect adapter", "apply adapter")
    ),
    "sweep": Target("settings/sweep.json", mutation.json_document, _read_sweep),
    "scores": Target("scores.json", mutation.json_document, _read_scores),
    "data": Target("data.jsonl", mutation.json_lines, _read_data),
    "recipe": Target("run.yaml", mutation.any_bytes, _read_recipe, ("recipe check",)),
}

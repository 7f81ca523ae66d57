"""The files that others may have made or damaged, each with the ways in which the package reads it.

A new kind of file needs one more row in ``TARGETS``.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hypothesis.strategies import SearchStrategy

from perta_fast.checkpoints.adapters import Adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.data.json_lines import load_rows
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.importance.store import Importance
from perta_fast.records.recipe import read_recipe
from perta_fast.records.report import DataRecord, Report
from perta_fast.reporting.evidence import read_scores
from perta_fast.runs.apply import apply
from perta_fast.sweeping.results import ScoredSetting, Sweep
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

    file: its place below the folder of ``write_run``. damage: draws damaged bytes in place of its own. read:
    opens the damaged file, given its path, as the package does; PertaError is a refusal, AssertionError a wrong
    result. commands: those of ``COMMANDS`` that read it.
    """

    file: str
    damage: Callable[[bytes], SearchStrategy[bytes]]
    read: Callable[[Path], None]
    commands: tuple[str, ...] = ()


# Command lines, below the folder of ``write_run``.
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
    """The inputs of ``perta apply``, some in one file and some in two, its output, and a data file."""
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
    """A LoRA adapter of rank 2 on the embedding."""
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    write_checkpoint(folder, {f"{stem}_A": draw((2, 37)), f"{stem}_B": draw((5, 2), seed=1)}, stem="adapter_model")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": {"tokens": 5, "embed_tokens": 4}}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_sweep(folder: Path) -> None:
    """The record of a search on two curves; one strength has broken the model, one was skipped."""
    rows = [
        ScoredSetting("", 1.0, 1.0, 0.0, 0.1, 0.2, 0.1, 0.2, 0.0, 1.5),
        ScoredSetting("tv", 1.0, 1.0, 1.0, 2.0, 0.4, 2.0, 0.4, 0.9, 1.5),
        ScoredSetting("tv", 1.0, 1.0, 2.0, math.nan, math.inf, math.nan, math.inf, 1.0, 1.5),
        ScoredSetting("grad", 1.0, 4.0, 8.0, 3.0, 0.3, 3.0, 0.3, 0.9, 1.5),
        ScoredSetting("grad", 1.0, 4.0, 9.0, *[math.nan] * 5, 0.0, skipped=True),
    ]
    described: DataRecord = {"path": "data.jsonl", "blake3": "0" * 64, "samples": 3, "truncated": 0}
    data = dict.fromkeys(("forget", "retain"), described)
    sweep = Sweep(rows, "loss", 0.5, None, "best-forget", {"lams": [1, 2, 8, 9]}, {"model": "model"}, data)
    folder.mkdir()
    replace(sweep, gold=replace(rows[0], forget=6.0, forget_loss=6.0)).save(folder)


def _read_sweep(file: Path) -> None:
    """What is taken must have something to say, and choose what keeps the bound."""
    sweep = Sweep.read(file)
    assert sweep.summary()
    assert sweep.original in sweep.rows
    assert sum(map(len, sweep.curves().values())) == sum(bool(row.rule) for row in sweep.rows)
    best = sweep.best
    assert best is None or best.keeps(sweep.limit, sweep.floor)


def _read_scores(file: Path) -> None:
    """What is taken are finite numbers by name, or None."""
    (scores,) = read_scores([file])
    assert scores.values
    assert all(value is None or math.isfinite(value) for value in scores.values.values())
    scores.point()


def _read_adapter(file: Path) -> None:
    """What is taken must be a finite scale and factors that are a product of matrices."""
    for update in Adapter.open(file.parent).low_rank.values():
        assert math.isfinite(update.scale)
        left, right = update.factors()
        assert (len(left), right.shape[1]) == update.shape
        assert left.shape[1] == len(right)


def _read_weights(file: Path, stem: str = "model") -> None:
    """What is opened must be what the headers say, and every byte of data must belong to one tensor."""
    opened = Checkpoint.open(file.parent, stem)
    expected = {}
    for path in file.parent.glob("*.safetensors"):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:begin])
        table.pop("__metadata__", None)
        place = 0
        for row in sorted(table.values(), key=lambda row: row["data_offsets"]):
            assert row["data_offsets"] == [place, place + math.prod(row["shape"]) * ITEM_SIZES[row["dtype"]]]
            place = row["data_offsets"][1]
        assert begin + place == len(content)
        for name, row in table.items():
            first, last = row["data_offsets"]
            expected[name] = (row["dtype"], row["shape"], content[begin + first : begin + last])
    found = {
        name: (entry.dtype, list(entry.shape), opened.file_of(entry).path.read_bytes()[entry.begin : entry.end])
        for name, entry in opened.tensors.items()
    }
    assert found == expected


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
    records = load_rows(file)
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    assert len(records) == sum(bool(line.strip()) for line in lines)
    for record in records:
        assert record.content
        assert contains(json.loads(lines[int(record.where.rsplit(" ", 1)[1]) - 1]), dict(record.content))


def _read_recipe(file: Path) -> None:
    """What is taken must be what YAML's own objects hold, where such can be made of it."""
    settings = read_recipe(file)
    try:
        expected = yaml.safe_load(file.read_bytes())
    except ValueError:  # the 35th of May: a text to us
        return
    assert len(settings) == sum(value is not None for value in expected.values())
    for key, value in expected.items():
        if isinstance(key, str) and isinstance(value, str | bool):
            assert settings[key].value == value


def contains(whole: Any, part: Any) -> bool:
    """Whether ``whole`` has all that ``part`` has: the same lists, and in its tables at least the same rows."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(whole, list) and isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return repr(whole) == repr(part)  # NaN is itself here, and True is not 1


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

"""Names of the hub in place of paths, found in a cache that is made here; nothing goes over a network."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from perta_fast import InputError, RunError, apply, choose, cli, estimate_importance, evaluate, sweep, tune, unlearn
from perta_fast.data.rows import load_rows
from perta_fast.files.hub import hub_name, local_data, local_model
from tests.support.models import llama, write_job

REVISION = "0123456789abcdef0123456789abcdef01234567"
TEXT = b'{"text": "a"}\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and an empty directory to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path, name: str, kind: str = "model", **files: bytes) -> Path:
    """Put a repository into the cache, each file a link to its content; returns the directory of the revision."""
    top = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = top / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text(REVISION)
    (top / "blobs").mkdir()
    for number, (file, content) in enumerate(files.items()):
        blob, link = top / "blobs" / f"{number:040x}", snapshot / file.replace("__", "/").replace("_dot_", ".")
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def test_a_model_of_the_cache(cache: Path) -> None:
    snapshot = kept(cache, "org/model", model_dot_safetensors=b"", config_dot_json=b"{}")
    assert local_model("org/model") == local_model(Path("org/model")) == snapshot


def test_a_path_comes_first(cache: Path) -> None:
    kept(cache, "org/model", model_dot_safetensors=b"")
    kept(cache, "org/data", "dataset", a_dot_jsonl=TEXT)
    Path("org/model").mkdir(parents=True)
    Path("org/data").write_bytes(TEXT)
    assert local_model("org/model") == Path("org/model")
    assert local_data("org/data") == Path("org/data")
    assert local_data("org/data:train") == Path("org/data:train")


@pytest.mark.parametrize("path", ["model", "/org/model", "../org/model", "a/b/c", "org/model:x", "-org/model"])
def test_what_is_no_name(path: str, cache: Path) -> None:
    assert local_model(path) == Path(path)


def test_data_of_the_cache(cache: Path) -> None:
    snapshot = kept(
        cache,
        "org/data",
        "dataset",
        data__train_dot_jsonl=TEXT,
        forget10_dot_json=b'[{"text": "b"}]',
        README_dot_md=b"x",
    )
    assert local_data("org/data") == snapshot
    for name, text in {"forget10": "b", "train": "a", "data/train": "a", "data/train.jsonl": "a"}.items():
        (row,) = load_rows(local_data(f"org/data:{name}"))
        assert row.content == {"text": text}
    with pytest.raises(InputError, match=r"with the data files data/train, forget10; name one"):
        load_rows(local_data("org/data"))


@pytest.mark.parametrize(("name", "given"), [("org/data", "give org/data with download, or "), ("data", "")])
def test_a_shard_that_the_cache_lacks(name: str, given: str, cache: Path) -> None:
    snapshot = kept(cache, name, "dataset", **{"data__train-00000-of-00002_dot_jsonl": TEXT})
    (snapshot / "data" / "train-00001-of-00002.jsonl").symlink_to("gone")
    with pytest.raises(InputError) as caught:
        load_rows(snapshot)
    assert str(caught.value) == (
        f"{snapshot}: data/train lacks 1 of 2 shards, first data/train-00001-of-00002; {given}fetch it with: "
        f"hf download --repo-type dataset {name}"
    )


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_the_cache_lacks_names_the_command(kind: str, cache: Path) -> None:
    local = local_model if kind == "model" else local_data
    with pytest.raises(InputError) as caught:
        local("org/name")
    option = "" if kind == "model" else "--repo-type dataset "
    assert "pass download, or" in str(caught.value)
    assert str(caught.value).endswith(f", or fetch it with: hf download {option}org/name")
    Path("org").mkdir()  # then it is rather a file that is missing in that directory
    assert local("org/name") == Path("org/name")


def test_a_model_without_its_weights(cache: Path) -> None:
    kept(cache, "org/model", config_dot_json=b"{}")
    with pytest.raises(InputError, match=r"org/model: .* no weights .*: hf download org/model$"):
        local_model("org/model")


def test_a_download_was_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name} | options)
        return str(kept(cache, name, options["repo_type"], model_dot_safetensors=b"", a_dot_jsonl=TEXT))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_model("org/name", download=True).name == REVISION
    assert local_data("org/name:a", download=True).name == f"{REVISION}:a"
    kinds = [(entry["repo_type"], entry["local_files_only"]) for entry in asked]
    assert kinds == [("model", False), ("dataset", False)]


@pytest.mark.parametrize("error", [OSError("no\nroute"), ValueError("no"), LocalEntryNotFoundError("no")])
def test_a_download_that_fails(error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(RunError, match=r"org/name: cannot be downloaded: no$"):
        local_model("org/name", download=True)


NAMES = ("org/model", "org/base", "org/tuned")
DATA = {"forget": "org/data:forget", "retain": "org/data:retain"}
WRONG: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any], str]] = {
    "the rule": (unlearn, NAMES, DATA | {"rule": "fish", "lam": 1.0, "out": "o"}, "rule is 'fish'"),
    "no data": (unlearn, NAMES, {"rule": "tv", "out": "o"}, "choosing lam needs forget data"),
    "no result": (unlearn, NAMES, DATA | {"rule": "tv", "lam": 1.0}, "give either out, a directory to make"),
    "the fields": (unlearn, NAMES, DATA | {"fields": "q=a", "out": "o"}, "fields is 'q=a'; give a dictionary"),
    "lams": (sweep, NAMES, DATA | {"lams": "-"}, r"lams\[0\] is '-', not a number"),
    "a curve": (sweep, NAMES, DATA | {"lams": [1], "rule": "fisher", "p": -1}, "p is -1"),
    "no bound": (sweep, NAMES, DATA, "give lams, or a bound"),
    "a choice": (choose, NAMES, DATA | {"rules": "fish", "out": "o"}, "rule is 'fish'"),
    "the suite": (evaluate, NAMES[:1], {"suite": "tofo", "data": "org/data"}, "suite is 'tofo'"),
    "the sets": (evaluate, NAMES[:1], {"suite": "tofu", "data": "org/data", "forget": "f"}, "forget: the suite has"),
    "against": (evaluate, NAMES[:1], DATA | {"against": "org/base"}, "against is for counting codes"),
    "streamed": (evaluate, NAMES[:1], DATA | {"stream": True, "stress": ["int8"]}, "stress needs the whole model"),
    "gold": (evaluate, NAMES[:1], DATA | {"reference": "g.json"}, "reference serves PrivLeak alone, which needs hold"),
    "of a tuning": (tune, NAMES[:1], {"forget": "org/data", "out": "o", "fields": "q=a"}, "fields is 'q=a'; give a d"),
    "epochs": (tune, NAMES[:1], {"forget": "org/data", "out": "o", "epochs": 0}, "epochs is 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_anything_is_fetched(
    what: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    function, names, settings, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        function(*names, download=True, progress=False, **settings)


def test_the_check_of_a_recipe_fetches_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    shared = "download: true\nmodel: org/model\nbase: org/base\ntuned: org/tuned\nforget: org/data:forget\n"
    shared += "retain: org/data:retain\n"
    good = "sweep:\n  lams: '1'\n  out: settings\n"
    for wrong, said in (
        ("sweep:\n  lams: '-'\n  out: s\n", "job.yaml, line 8: lams: '-' is not a list of numbers"),
        ("sweep:\n  lams: 'nan'\n  out: s\n", "job.yaml, sweep: lams has nan"),
        ("unlearn:\n  batch-size: 0\n  out: o\n", "job.yaml, unlearn: batch-size is 0; it must be at least 1"),
        ("unlearn:\n  rule: fisher\n  lam: 1\n  as: ratio\n  out: o\n", "job.yaml, unlearn: as "),
        ("unlearn:\n  choose: max-retain-rise\n  lams: nan\n  out: o\n", "job.yaml, unlearn: lams has nan"),
        (
            f"{good}eval:\n  model: m\n  stream: true\n  stress: int8\n  out: s.json\n",
            "job.yaml, eval: stress needs the whole model",
        ),
    ):
        Path("job.yaml").write_text(shared + wrong)
        assert cli.main(["recipe", "check", "job.yaml"]) == 2
        assert capsys.readouterr().err.startswith(f"perta: error: {said}")


def test_data_that_is_no_path() -> None:
    with pytest.raises(InputError, match="data is list, and here it must be a file; write one, with to_json"):
        local_data([{"text": "a"}])  # type: ignore[arg-type]


def saved(cache: Path, name: str, seed: int) -> Path:
    llama(seed).save_pretrained("made")
    files = {path.name.replace(".", "_dot_"): path.read_bytes() for path in Path("made").iterdir()}
    return kept(cache, name, **files)


@pytest.mark.slow
def test_apply_by_names(cache: Path) -> None:
    snapshots = [saved(cache, f"org/{name}", seed) for seed, name in enumerate(("model", "base", "tuned"))]
    report = apply("org/model", "org/base", "org/tuned", rule="tv", out="by-name", progress=False)
    assert report.inputs["model"]["path"] == str(snapshots[0].resolve())  # names the model and its revision
    apply(*snapshots, rule="tv", out="by-path", progress=False)
    assert Path("by-name/model.safetensors").read_bytes() == Path("by-path/model.safetensors").read_bytes()


def test_a_data_set_without_its_rows(cache: Path) -> None:
    kept(cache, "org/data", "dataset", README_dot_md=b"x")
    with pytest.raises(InputError, match=r"org/data:train: .* no file of this data set's rows; .* dataset org/data$"):
        local_data("org/data:train")


@pytest.mark.slow
def test_every_command_by_names(cache: Path, one_thread: None) -> None:
    job = write_job(Path("job").absolute(), torch.float32)
    for name, path in zip(("model", "base", "tuned"), job.checkpoints, strict=True):
        kept(cache, f"org/{name}", **{file.name.replace(".", "_dot_"): file.read_bytes() for file in path.iterdir()})
    rows = {"forget_dot_jsonl": job.forget.read_bytes(), "retain_dot_jsonl": job.retain.read_bytes()}
    kept(cache, "org/data", "dataset", **rows)
    sets = {"forget": "org/data:forget", "retain": "org/data:retain"}
    names, quiet = ("org/model", "org/base", "org/tuned"), {"progress": False}
    swept = sweep(*names, **sets, lams=[1.0], out="swept", **quiet)
    expected = sweep(*job.checkpoints, job.forget, job.retain, lams=[1.0], **quiet)
    assert swept.rows[1].forget_loss == expected.rows[1].forget_loss
    assert swept.data["forget"]["path"].endswith(f"datasets--org--data/snapshots/{REVISION}:forget")
    importance = estimate_importance("org/base", "org/data:forget", **quiet)
    expected_importance = estimate_importance(job.base, job.forget, **quiet)
    assert importance.metadata.data_hash == expected_importance.metadata.data_hash
    assert f"models--org--base/snapshots/{REVISION}" in importance.metadata.evaluated_at
    report = unlearn(*names, **{"rule": "fisher"} | sets, lam=1.0, out="made", **quiet)
    unlearn(*job.checkpoints, job.forget, job.retain, lam=1.0, out="made-by-path", **{"rule": "fisher"} | quiet)
    for path in Path("made-by-path").glob("*.safetensors"):
        assert path.read_bytes() == (Path("made") / path.name).read_bytes()
    assert cli.main(["unlearn", "--recipe", "made/perta_report.json", "--out", "again"]) == 0
    assert cli.main(["verify", "made"]) == 0
    assert report.data["retain"]["path"].endswith(":retain")
    tuning = tune("org/base", "org/data:forget", "adapter", rank=2, epochs=1, **quiet)
    assert tuning.data["blake3"] == report.data["forget"]["blake3"]
    scores = evaluate("org/model", forget="org/data:forget", metrics=["forget_Q_A_Prob"], **quiet)
    assert (
        scores["forget_Q_A_Prob"]
        == evaluate(job.model, forget=job.forget, metrics=["forget_Q_A_Prob"], **quiet)["forget_Q_A_Prob"]
    )


@pytest.mark.slow
def test_names_in_a_recipe(cache: Path, tmp_path: Path) -> None:
    """They are not paths that begin at the recipe's directory; where they could be, they are."""
    for seed, name in enumerate(("model", "base", "tuned")):
        saved(cache, f"org/{name}", seed)
    folder = tmp_path / "recipes"
    folder.mkdir()
    lines = ["model: org/model", "base: org/base", "tuned: org/tuned", "rule: tv", "lam: 1", "out: org-out/tv"]
    (folder / "run.yaml").write_text("\n".join(lines))
    assert cli.main(["unlearn", "--recipe", str(folder / "run.yaml")]) == 0
    assert (folder / "org-out" / "tv" / "perta_report.json").is_file()
    (folder / "org").mkdir()
    assert cli.main(["unlearn", "--recipe", str(folder / "run.yaml"), "--overwrite"]) == 2


@pytest.mark.slow
def test_the_cache_is_not_changed_in_place(cache: Path) -> None:
    snapshot = saved(cache, "org/model", 0)
    saved(cache, "org/base", 1)
    saved(cache, "org/tuned", 2)
    with pytest.raises(InputError) as caught:
        apply("org/model", "org/base", "org/tuned", rule="tv", in_place=True, progress=False)
    command = str(caught.value).partition("copy it first: ")[2]
    assert command == f"cp -rL {snapshot} DIR"
    assert os.system(command) == 0
    apply("DIR", "org/base", "org/tuned", rule="tv", in_place=True, progress=False)


@pytest.mark.parametrize(
    ("part", "name"),
    [("models--org--a-model.v2", "org/a-model.v2"), ("models--gpt2", "gpt2"), ("models", None), ("models-- a", None)],
)
def test_the_name_of_a_model_in_the_cache(part: str, name: str | None) -> None:
    assert hub_name(f"/somewhere/hub/{part}/snapshots/{REVISION}") == name


@pytest.mark.parametrize("path", ["/data/models--old/llama", "/data/models--old", "snapshots/models--old/blobs"])
def test_a_directory_that_only_looks_like_a_cache(path: str) -> None:
    assert hub_name(path) is None
    assert hub_name(f"{path}/models--org--model/snapshots/{REVISION}") == "org/model"

"""Companions of a model that are links: those of a hub cache are copied, those to elsewhere named and left out."""

import os
import shutil
from pathlib import Path

import pytest

from perta_fast import Report, cli
from perta_fast.runs.apply import apply
from perta_fast.runs.verify import verify
from tests.support.checkpoints import read_checkpoint, write_checkpoint
from tests.support.children import run_child
from tests.support.inputs import Inputs, write_inputs


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return write_inputs(tmp_path / "inputs")


def hub_cache(inputs: Inputs, folder: Path, *names: str) -> Path:
    """The model as the cache of a hub has it: every file a relative link to a blob of the same repository."""
    snapshot, blobs = folder / "models--x" / "snapshots" / "0123", folder / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in names:
        (inputs["model"] / name).write_text(f'{{"text of": "{name}"}}')
    for number, path in enumerate(sorted(inputs["model"].iterdir())):
        shutil.copyfile(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


MOVED = ["the hub", "the repository", "blobs", "blobs, to another name", "snapshots and blobs"]


@pytest.mark.parametrize("what", [*MOVED, "blobs, with absolute links"])
def test_a_hub_cache_of_which_a_part_is_on_another_disk(what: str, inputs: Inputs, tmp_path: Path) -> None:
    hub, disk = tmp_path / "home" / "hub", tmp_path / "disk"
    hub.mkdir(parents=True)
    disk.mkdir()
    model = hub_cache(inputs, hub, "config.json", "tokenizer.json", "README.md")
    repository = hub / "models--x"
    moved = {"the hub": [hub], "the repository": [repository], "snapshots and blobs": [repository / "snapshots"]}
    for path in [*moved.get(what, []), *([repository / "blobs"] if "blobs" in what else [])]:
        target = disk / ("store" if "another name" in what else path.name)
        path.rename(target)
        path.symlink_to(target)
    if "absolute" in what:
        for link in list(model.iterdir()):
            name = link.readlink().name
            link.unlink()
            link.symlink_to(repository / "blobs" / name)
    copied_from(model, inputs, tmp_path)


@pytest.mark.parametrize("linked", [False, True])
def test_a_hub_cache_with_a_store_of_all_models(linked: bool, inputs: Inputs, tmp_path: Path) -> None:
    """As new versions of huggingface_hub keep files: snapshots link to blobs, and these to the store."""
    model = hub_cache(inputs, tmp_path / "hub", "config.json", "tokenizer.json", "README.md")
    for number, blob in enumerate(sorted((model.parent.parent / "blobs").iterdir())):
        name = f"{number:02x}{'7' * 62}"
        store = tmp_path / "hub" / "blobs" / name[:2]
        store.mkdir(parents=True)
        blob.rename(store / name)
        blob.symlink_to(Path("../../blobs") / name[:2] / name)
    if linked:
        (tmp_path / "hub" / "blobs").rename(tmp_path / "store")
        (tmp_path / "hub" / "blobs").symlink_to(tmp_path / "store")
    copied_from(model, inputs, tmp_path)


@pytest.mark.parametrize("where", ["blobs", "store"])
@pytest.mark.parametrize("name", ["id_rsa", "notes.txt", "0" * 63, "g" * 64, "0" * 40 + ".txt"])
def test_a_private_directory_in_the_place_of_a_cache(where: str, name: str, inputs: Inputs, tmp_path: Path) -> None:
    """Blobs that are a link may lead anywhere: only files named by a hash are of a cache."""
    private = tmp_path / "private"
    (private / name[:2]).mkdir(parents=True)
    (private / name).write_text("private")
    (private / name[:2] / name).write_text("private")
    repository = tmp_path / "hub" / "models--x"
    model = repository / "snapshots" / "0123"
    shutil.copytree(inputs["model"], model)
    if where == "blobs":
        (repository / "blobs").symlink_to(private)
        (model / "notes.txt").symlink_to(Path("../../blobs") / name)
    else:
        (tmp_path / "hub" / "blobs").symlink_to(private)
        (model / "notes.txt").symlink_to(Path("../../../blobs") / name[:2] / name)
    report = apply(model, inputs["base"], inputs["tuned"], rule="tv", out=tmp_path / "out", progress=False)
    assert not os.path.lexists(tmp_path / "out" / "notes.txt")
    (warning,) = report.warnings
    assert "outside the model's directory, and was not copied" in warning


@pytest.mark.parametrize("by", ["its path", "a link", "a directory below the snapshot"])
def test_those_of_a_hub_cache_are_copied(by: str, inputs: Inputs, tmp_path: Path) -> None:
    model = hub_cache(inputs, tmp_path, "config.json", "tokenizer.json", "README.md")
    if by == "a link":
        (tmp_path / "latest").symlink_to(model)
        model = tmp_path / "latest"
    elif by == "a directory below the snapshot":
        below = model / "below"
        below.mkdir()
        for path in [path for path in model.iterdir() if path.is_symlink()]:
            (below / path.name).symlink_to(Path("..") / path.readlink())
        model = below
    copied_from(model, inputs, tmp_path)


def copied_from(model: Path, inputs: Inputs, tmp_path: Path) -> None:
    """Write an output, which has all files of the model."""
    report = apply(model, inputs["base"], inputs["tuned"], rule="tv", out=tmp_path / "out", progress=False)
    assert report.warnings == []
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == f'{{"text of": "{name}"}}'
        assert not (tmp_path / "out" / name).is_symlink()
    assert (tmp_path / "out" / "README.md").read_text().startswith('{"text of": "README.md"}\n\n## Unlearned')


def test_links_within_the_model_are_copied(inputs: Inputs, tmp_path: Path) -> None:
    model = inputs["model"]
    (model / "below").mkdir()
    (model / "below" / "config.json").write_text("{}")
    (model / "config.json").symlink_to("below/config.json")
    report = apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and report.warnings == []


@pytest.mark.parametrize("way", ["absolute", "relative", "through a link", "like a cache", "a cache of links"])
def test_those_to_elsewhere_are_named_and_left_out(
    way: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = tmp_path / "my home" / "private.txt"
    private.parent.mkdir()
    private.write_text("private")
    model = inputs["model"]
    if way in ("like a cache", "a cache of links"):
        model = hub_cache(inputs, tmp_path)
        if way == "a cache of links":  # the blob itself leads elsewhere
            (model.parent.parent / "blobs" / "f").symlink_to(private)
        else:
            shutil.copyfile(private, model.parent.parent / "f")
            private = model.parent.parent / "f"
        (model / "notes.txt").symlink_to("../../blobs/f" if way == "a cache of links" else "../../f")
    elif way == "through a link":
        (model / "below").symlink_to(private.parent)
        (model / "notes.txt").symlink_to("below/private.txt")
    else:
        (model / "notes.txt").symlink_to(private if way == "absolute" else Path("../../my home/private.txt"))
    (model / "config.json").write_text("{}")
    arguments = [f"--model={model}", f"--base={inputs['base']}", f"--tuned={inputs['tuned']}"]
    out = tmp_path / "out"
    assert cli.main(["apply", *arguments, "--rule=tv", "--lam=1", f"--out={out}"]) == 0
    assert (out / "config.json").exists() and not os.path.lexists(out / "notes.txt")
    assert all(b"private" not in path.read_bytes() for path in out.iterdir() if path.name != "perta_report.json")
    (warning,) = Report.load(out).warnings
    assert f"{model / 'notes.txt'} is a link to {private}, outside the model's directory" in warning
    assert warning in capsys.readouterr().out
    run_child(["sh", "-c", warning.rpartition("copy it with: ")[2]], check=True)
    assert (out / "notes.txt").read_text() == "private"


@pytest.mark.parametrize("linked", ["nothing", "file", "directory"])
def test_chat_templates_in_a_directory_of_their_own(linked: str, inputs: Inputs, tmp_path: Path) -> None:
    """transformers reads them; what lies outside the model is named, as for any other file."""
    templates, private = inputs["model"] / "additional_chat_templates", tmp_path / "my home"
    private.mkdir()
    (private / "tool.jinja").write_text("private")
    if linked == "directory":
        templates.symlink_to(private)
    else:
        templates.mkdir()
        (templates / "rag.jinja").write_text("{{ messages }}")
    if linked == "file":
        (templates / "tool.jinja").symlink_to(private / "tool.jinja")
    out = tmp_path / "out"
    report = apply(*inputs.checkpoints, rule="tv", out=out, progress=False)
    assert [path.name for path in (out / templates.name).iterdir()] == ["rag.jinja"] * (linked != "directory")
    if linked != "nothing":
        (warning,) = report.warnings
        run_child(["sh", "-c", warning.rpartition("copy it with: ")[2]], check=True)
        assert (out / templates.name / "tool.jinja").read_text() == "private"
    result = verify(out, progress=False)
    assert result.problems == [] and result.uncovered == []


def test_an_index_that_is_a_link_is_copied(inputs: Inputs, tmp_path: Path) -> None:
    """It was read as an index, so it holds names of tensors, and without it the output would not load."""
    model = inputs["model"]
    tensors = read_checkpoint(model)
    shutil.rmtree(model)
    write_checkpoint(model, tensors, 2)
    (model / "model.safetensors.index.json").rename(tmp_path / "index.json")
    (model / "model.safetensors.index.json").symlink_to(tmp_path / "index.json")
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    copy = tmp_path / "out" / "model.safetensors.index.json"
    assert copy.read_bytes() == (tmp_path / "index.json").read_bytes() and not copy.is_symlink()


def test_what_bears_the_name_of_unfinished_work_is_no_companion(inputs: Inputs, tmp_path: Path) -> None:
    for name in (".perta-run", ".perta-sweep", ".x.perta-partial"):
        (inputs["model"] / name).write_text("mine")
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]

"""No run removes what it reads: not where it keeps unfinished work, not behind links or mounts of single files."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import perta_fast as pf
from perta_fast import cli
from perta_fast.files.apart import input_in
from tests.support.checkpoints import fingerprint
from tests.support.children import run_child
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")

PARTIAL, REPLACED = ".o.perta-partial", ".o.perta-replaced"
SCRATCH = "..o.perta-importance.perta-partial"


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], folder: Path, said: str, *arguments: object) -> None:
    """``perta`` exits with 2, says why, and changes nothing in ``folder``."""
    before = fingerprint(folder)
    capsys.readouterr()
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
    assert fingerprint(folder) == before


def options(job: Job, **changed: Path) -> list[str]:
    paths = {"model": job.model, "base": job.base, "tuned": job.tuned} | changed
    return [f"--{role}={path}" for role, path in paths.items()] + ["--lam=1"]


def data(job: Job, **changed: Path) -> list[str]:
    return [f"--{role}={path}" for role, path in ({"forget": job.forget, "retain": job.retain} | changed).items()]


@pytest.mark.parametrize("where", [PARTIAL, f"{PARTIAL}/m", REPLACED, f"{REPLACED}/m"])
@pytest.mark.parametrize("role", ["model", "base", "tuned"])
def test_a_checkpoint_in_a_hidden_place_of_the_run(
    role: str, where: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a result that could not be renamed, and was kept there."""
    shutil.copytree(getattr(job, role), tmp_path / where)
    moved = options(job, **{role: tmp_path / where})
    hidden = where.split("/")[0]
    said = f"would remove this input with its unfinished work in {tmp_path / hidden}; move it away"
    for end in ([], ["--overwrite"]):
        refused(capsys, tmp_path, said, "apply", *moved, "--rule=tv", f"--out={tmp_path / 'o'}", *end)
    refused(capsys, tmp_path, said, "unlearn", "--rule=fisher", *moved, *data(job), f"--out={tmp_path / 'o'}")
    (tmp_path / where).rename(tmp_path / "away")  # what the message says
    again = options(job, **{role: tmp_path / "away"})
    assert run("apply", *again, "--rule=tv", f"--out={tmp_path / 'o'}", "--overwrite") == 0


def test_other_inputs_in_a_hidden_place_of_the_run(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={tmp_path / 'o'}"
    said = "would remove this input with its unfinished work in"
    for place in (PARTIAL, SCRATCH, ".k.perta-partial", ".o.json.perta-partial"):
        (tmp_path / place).mkdir()
        hidden = Path(shutil.copy(job.forget, tmp_path / place / "forget.jsonl"))
        forget = data(job, forget=hidden)
        if place in (PARTIAL, SCRATCH):
            refused(capsys, tmp_path, said, "unlearn", "--rule=fisher", *options(job), *forget, out)
        if place == PARTIAL:
            refused(capsys, tmp_path, said, "unlearn", *options(job), *forget, "--rule=tv", out)
            refused(capsys, tmp_path, said, "unlearn", "--rule=fisher", *options(job), *forget, "--stream", out)
            refused(capsys, tmp_path, said, "importance", f"--model={job.base}", f"--data={hidden}", out)
            refused(capsys, tmp_path, said, "tune", f"--base={job.base}", f"--forget={hidden}", out)
            sweep = ["sweep", *options(job)[:3], *forget, "--lams=1", "--rule=tv"]
            refused(capsys, tmp_path, said, *sweep, out)
            chosen = [f"--checkpoint={tmp_path / 'o'}", "--select=best-forget", "--max-retain-increase=9"]
            refused(capsys, tmp_path, said, *sweep, f"--out={tmp_path / 's'}", *chosen)
        if place == ".k.perta-partial":
            save = f"--save-importance={tmp_path / 'k'}"
            refused(capsys, tmp_path, said, "unlearn", "--rule=fisher", *options(job), *forget, out, save)
        shutil.rmtree(tmp_path / place)
    hidden = Path(shutil.copy(job.forget, tmp_path / ".o.json.perta-partial"))
    refused(capsys, tmp_path, said, "eval", f"--model={job.base}", f"--forget={hidden}", f"--out={tmp_path / 'o.json'}")


def test_data_in_the_journal(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    (model / ".perta-journal").mkdir()
    forget = data(job, forget=Path(shutil.copy(job.forget, model / ".perta-journal" / "forget.jsonl")))
    said = f"would remove this input with its unfinished work in {model / '.perta-journal'}"
    refused(capsys, tmp_path, said, "unlearn", "--rule=fisher", *options(job, model=model), *forget, "--in-place")
    shutil.copytree(job.tuned, model / ".perta-journal" / "tuned")
    moved = options(job, model=model, tuned=model / ".perta-journal" / "tuned")
    refused(capsys, tmp_path, said, "apply", *moved, "--rule=tv", "--in-place", "--leave-others")


@pytest.mark.parametrize("name", [PARTIAL, f"{PARTIAL}/x", REPLACED, "model/.perta-journal", "model/.perta-journal/x"])
def test_no_output_where_runs_keep_unfinished_work(
    name: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next run would remove it."""
    model = shutil.copytree(job.model, tmp_path / "model")
    out, said = tmp_path / name, "runs keep unfinished work under the name"
    both = ["unlearn", "--rule=fisher", *options(job, model=model), *data(job)]
    refused(capsys, tmp_path, said, "apply", *options(job, model=model), "--rule=tv", f"--out={out}")
    refused(capsys, tmp_path, said, *both, f"--out={out}", "--stream")
    for end in ([f"--out={tmp_path / 'o'}"], ["--in-place"], [f"--out={tmp_path / 'o'}", "--stream"]):
        refused(capsys, tmp_path, said, *both, f"--save-importance={out}", *end)
    refused(capsys, tmp_path, said, "importance", f"--model={model}", f"--data={job.forget}", f"--out={out}")
    refused(capsys, tmp_path, said, "tune", f"--base={model}", f"--forget={job.forget}", f"--out={out}")
    sweep = ["sweep", *options(job)[:3], *data(job), "--lams=1", "--rule=tv"]
    refused(capsys, tmp_path, said, *sweep, f"--out={out}")
    refused(capsys, tmp_path, said, "eval", f"--model={model}", f"--forget={job.forget}", f"--out={out}/a.json")
    refused(capsys, tmp_path, said, "demo", "--fast", f"--out={out}")
    if not out.parent.exists():
        out.parent.mkdir()
    (tmp_path / "link").symlink_to(out)
    refused(capsys, tmp_path, said, "apply", *options(job, model=model), "--rule=tv", f"--out={tmp_path / 'link'}")


def linked(job: Job, folder: Path, link: Callable[[Path, Path], None]) -> Path:
    """A checkpoint whose shards lie in ``folder``."""
    folder.mkdir()
    model = shutil.copytree(job.base, folder.with_name("base"))
    for shard in model.glob("*.safetensors"):
        shard.rename(folder / shard.name)
        link(shard, folder / shard.name)
    return model


def commands(job: Job, base: Path, folder: Path, out: Path) -> list[list[object]]:
    """Each writes ``out``, and reads ``base``."""
    to_out, elsewhere = [f"--out={out}", "--overwrite"], f"--out={folder / 'elsewhere'}"
    kept = [
        "unlearn",
        "--rule=fisher",
        *options(job, base=base),
        *data(job),
        f"--save-importance={out}",
        elsewhere,
        "--overwrite",
    ]
    return [
        ["apply", *options(job, base=base), "--rule=tv", *to_out],
        ["importance", f"--model={base}", f"--data={job.forget}", *to_out],
        ["importance", f"--model={base}", f"--data={job.forget}", *to_out, "--stream"],
        ["tune", f"--base={base}", f"--forget={job.forget}", *to_out],
        ["tune", f"--base={base}", f"--forget={job.forget}", "--full", *to_out],
        ["unlearn", "--rule=fisher", *options(job, base=base), *data(job), *to_out],
        kept,
        [*kept, "--stream"],
        ["sweep", *options(job, base=base)[:3], *data(job), "--lams=1", "--rule=tv", *to_out],
        [
            "sweep",
            *options(job)[:3],
            *data(job),
            "--lams=1",
            "--rule=tv",
            f"--gold={base}",
            "--select=closest",
            *to_out,
        ],
    ]


def test_shards_that_are_links_into_the_output(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = linked(job, tmp_path / "out", Path.symlink_to)
    for command in commands(job, base, tmp_path, tmp_path / "out"):
        refused(capsys, tmp_path, "is or contains the input", *command)


@pytest.fixture
def bind() -> Iterator[Callable[[Path, Path], None]]:
    """Mounts the second file over the first."""
    made: list[Path] = []

    def mount(path: Path, source: Path) -> None:
        path.touch()
        if run_child(["mount", "--bind", source, path]).returncode != 0:
            pytest.skip("mounting is not permitted here")
        made.append(path)

    yield mount
    for path in made:
        run_child(["umount", path], check=True)


def test_single_files_that_are_mounted_from_the_output(
    job: Job, tmp_path: Path, bind: Callable[[Path, Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    base = linked(job, tmp_path / "out", bind)
    for command in commands(job, base, tmp_path, tmp_path / "out"):
        refused(capsys, tmp_path, "is or contains the input", *command)
    shutil.copy(job.forget, tmp_path / "out" / "data")
    bind(tmp_path / "forget.jsonl", tmp_path / "out" / "data")
    forget, out = data(job, forget=tmp_path / "forget.jsonl"), [f"--out={tmp_path / 'out'}", "--overwrite"]
    refused(capsys, tmp_path, "contains the input", "unlearn", *options(job), *forget, "--rule=tv", *out)
    refused(capsys, tmp_path, "contains the input", "sweep", *options(job)[:3], *forget, "--lams=1", "--rule=tv", *out)


def test_a_second_name_is_no_input(job: Job, tmp_path: Path) -> None:
    """A hard link in the output goes, and the input stays."""
    base = linked(job, tmp_path / "out", lambda path, target: os.link(target, path))
    assert input_in(tmp_path / "out", [base]) is None
    assert run(*commands(job, base, tmp_path, tmp_path / "out")[0]) == 0
    assert input_in(tmp_path / "missing", [base]) is None
    assert input_in(base, [base / "config.json"]) == base / "config.json"


def test_a_recipe_in_the_output(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lines = [f"{role}: {path}\n" for role, path in (("model", job.model), ("base", job.base), ("tuned", job.tuned))]
    recipe = out / "recipe.yaml"
    recipe.write_text("".join([*lines, "rule: tv\nlam: 1\nout: .\n"]))
    said = f"is or contains the input {recipe}"
    refused(capsys, tmp_path, said, "unlearn", f"--recipe={recipe}", "--overwrite")
    refused(capsys, tmp_path, said, "unlearn", f"--recipe={recipe}", "--overwrite", f"--out={tmp_path}")
    both = [*data(job), "--rule=fisher", f"--out={tmp_path / 'o'}", f"--save-importance={out}", "--overwrite"]
    refused(capsys, tmp_path, said, "unlearn", f"--recipe={recipe}", *both)
    assert run("unlearn", f"--recipe={recipe}", f"--out={tmp_path / 'o'}") == 0
    report = tmp_path / "o" / "perta_report.json"
    again = ["unlearn", f"--recipe={report}", f"--out={tmp_path / 'o'}", "--overwrite"]
    refused(capsys, tmp_path, f"is or contains the input {report}", *again)


def test_an_empty_path_is_not_the_working_directory(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for command in (["apply", *options(job), "--rule=tv", "--out=", "--overwrite"], ["resume", ""], ["verify", ""]):
        with pytest.raises(SystemExit) as ended:
            run(*command)
        assert ended.value.code == 2
        assert "the path is empty" in capsys.readouterr().err
    calls: list[Callable[[], object]] = [
        lambda: pf.apply(*job.checkpoints, rule="tv", out="", overwrite=True),
        lambda: pf.unlearn(*job.checkpoints, job.forget, job.retain, out="", overwrite=True, lam=1.0, rule="fisher"),
        lambda: pf.unlearn(
            *job.checkpoints,
            job.forget,
            job.retain,
            out="o",
            save_importance="",
            overwrite=True,
            lam=1.0,
            rule="fisher",
        ),
        lambda: pf.estimate_importance(job.base, job.forget, out="", overwrite=True),
        lambda: pf.tune(job.base, job.forget, "", overwrite=True),
        lambda: pf.sweep(*job.checkpoints, job.forget, job.retain, lams=[1], rule="tv", out="", overwrite=True),
        lambda: pf.evaluate(job.base, forget=job.forget, out="", overwrite=True),
        lambda: pf.resume(""),
    ]
    for call in calls:
        with pytest.raises(pf.InputError, match="a path is empty"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

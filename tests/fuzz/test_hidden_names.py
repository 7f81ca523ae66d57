"""Links, pipes and mount points under the names that runs keep unfinished work by: refused by name, never followed.

``elsewhere`` is a directory that no run may touch. It holds files of all names that runs write or remove.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perta_fast import InputError, Interrupted, cli, resume, sweep, unlearn
from perta_fast.files import own
from perta_fast.files.durable import read_record, write_file, write_record
from perta_fast.files.new_file import write_output_file
from perta_fast.files.own import check_own, own_file
from perta_fast.runs.apply import apply
from perta_fast.scoring.live_model import ScoredModel
from perta_fast.streaming.write_behind import WriteBehind
from perta_fast.subtraction import compute, in_place, to_directory
from tests.support.checkpoints import read_checkpoint, same_bytes
from tests.support.children import perta, run_child, signal_at
from tests.support.inputs import Inputs, write_inputs
from tests.support.models import Job

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (
    *("config.json", "README.md", "perta_report.json", "job.json", "begun.json", "applying", "sealed", "walk.json"),
    *("segment-0", "segment-1", "segment-2", "model.safetensors", "importance.safetensors", "sweep.json", "sweep.png"),
    *("a.json", "page.html"),
)
REFUSED = r"is a link|is not a directory|is not a plain file|has a second name"

Content = dict[Path, tuple[int, bytes | str | None]]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    (folder / "below").mkdir(parents=True)
    for name in (*NAMES, "below/mine.txt"):
        (folder / name).write_text(f"mine: {name}")
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    inputs = write_inputs(tmp_path / "inputs", shards=2)
    (inputs["model"] / "config.json").write_text("{}")
    return inputs


def content(folder: Path) -> Content:
    """Everything below ``folder``: kind, and content of files or target of links."""
    found: Content = {}
    for path in sorted(folder.rglob("*")):
        what: bytes | str | None = None
        if path.is_symlink():
            what = str(path.readlink())
        elif path.is_file():
            what = path.read_bytes()
        found[path] = path.lstat().st_mode, what
    return found


# What may lie under a hidden name.
TRAPS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, elsewhere: path.symlink_to(elsewhere),
    "relative link": lambda path, elsewhere: path.symlink_to(os.path.relpath(elsewhere, path.parent)),
    "link to a file": lambda path, elsewhere: path.symlink_to(elsewhere / "job.json"),
    "dangling link": lambda path, elsewhere: path.symlink_to(elsewhere / "new"),
    "file": lambda path, _: path.write_text("mine"),
    "pipe": lambda path, _: os.mkfifo(path),
}


def refused(command: list[object], trap: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """``perta`` exits with 2, names ``trap`` and changes nothing in ``folder``."""
    before = content(folder)
    capsys.readouterr()
    assert cli.main(list(map(str, command))) == 2
    assert f"{trap}: " in capsys.readouterr().err
    assert content(folder) == before


def checkpoints(inputs: Inputs | Job) -> list[object]:
    model, base, tuned = inputs.checkpoints
    return [f"--model={model}", f"--base={base}", f"--tuned={tuned}", "--lam=1"]


@pytest.mark.parametrize("kind", TRAPS)
def test_a_journal_that_is_none(
    kind: str, inputs: Inputs, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = inputs["model"] / ".perta-journal"
    TRAPS[kind](trap, elsewhere)
    refused(["apply", *checkpoints(inputs), "--rule=tv", "--in-place"], trap, capsys, tmp_path)
    if kind in ("link", "relative link"):  # it leads to a file of the name of a job
        refused(["resume", inputs["model"]], trap, capsys, tmp_path)
        refused(["inspect", inputs["model"]], trap, capsys, tmp_path)
        refused(["apply", *checkpoints(inputs), "--rule=tv", f"--out={tmp_path / 'out'}"], trap, capsys, tmp_path)
    trap.unlink()  # what the message says
    apply(*inputs.checkpoints, rule="tv", in_place=True, progress=False)


@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("ending", ["partial", "replaced"])
def test_a_hidden_directory_beside_an_output(
    ending: str, kind: str, inputs: Inputs, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = tmp_path / f".out.perta-{ending}"
    TRAPS[kind](trap, elsewhere)
    command = ["apply", *checkpoints(inputs), "--rule=tv", f"--out={tmp_path / 'out'}"]
    for end in ([], ["--overwrite"]):
        refused([*command, *end], trap, capsys, tmp_path)
    trap.unlink()
    assert cli.main(list(map(str, command))) == 0


def test_every_command_that_makes_a_directory(
    job: Job, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    data = [f"--forget={job.forget}", f"--retain={job.retain}"]
    model, base, tuned = (
        f"--{role}={path}" for role, path in zip(("model", "base", "tuned"), job.checkpoints, strict=True)
    )
    whole = ["unlearn", "--rule=fisher", *checkpoints(job), *data]
    commands: dict[str, list[object]] = {
        "importance": ["importance", f"--model={job.base}", f"--data={job.forget}"],
        "importance --stream": ["importance", f"--model={job.base}", f"--data={job.forget}", "--stream"],
        "tune": ["tune", base, f"--forget={job.forget}"],
        "tune --full": ["tune", base, f"--forget={job.forget}", "--full"],
        "sweep": ["sweep", model, base, tuned, *data, "--lams=1"],
        "unlearn": whole,
        "unlearn --stream": [*whole, "--stream"],
    }
    trap = tmp_path / ".out.perta-partial"
    trap.symlink_to(elsewhere)
    for command in commands.values():
        refused([*command, f"--out={out}", "--overwrite"], trap, capsys, tmp_path)
    trap.rename(tmp_path / ".kept.perta-partial")
    for end in ([], ["--stream"]):
        command = [*whole, f"--out={out}", f"--save-importance={tmp_path / 'kept'}", *end]
        refused(command, tmp_path / ".kept.perta-partial", capsys, tmp_path)
    (tmp_path / ".kept.perta-partial").rename(tmp_path / ".chosen.perta-partial")
    chosen = ["--select=best-forget", "--retain-floor=0", "--metric=Q_A_Prob", f"--checkpoint={tmp_path / 'chosen'}"]
    command = [*commands["sweep"], *chosen, f"--out={out}"]
    refused(command, tmp_path / ".chosen.perta-partial", capsys, tmp_path)


@pytest.mark.parametrize("name", [".{}.perta-importance", "..{}.perta-importance.perta-partial"])
@pytest.mark.parametrize("target", ["--out", "--in-place"])
def test_importances_beside_a_result(
    target: str, name: str, job: Job, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(job.model, tmp_path / "model")
    result = model if target == "--in-place" else tmp_path / "out"
    trap = tmp_path / name.format(result.name)
    trap.symlink_to(elsewhere)
    command = ["unlearn", "--rule=fisher", f"--model={model}", f"--base={job.base}", f"--tuned={job.tuned}", "--lam=1"]
    data = [f"--forget={job.forget}", f"--retain={job.retain}"]
    end = [target] if target == "--in-place" else [f"{target}={result}"]
    refused([*command, *data, *end], trap, capsys, tmp_path)


@pytest.mark.parametrize("kind", ["link to a file", "dangling link", "pipe", "directory", "hard link"])
def test_a_hidden_file_beside_a_file(
    kind: str, job: Job, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: dict[str, list[object]] = {
        "scores.json": ["eval", f"--model={job.model}", f"--forget={job.forget}"],
        "recipe.yaml": ["recipe", "init"],
    }
    for name, command in commands.items():
        trap = tmp_path / f".{name}.perta-partial"
        if kind == "directory":
            shutil.copytree(elsewhere, trap)
        elif kind == "hard link":
            os.link(elsewhere / "job.json", trap)
        else:
            TRAPS[kind](trap, elsewhere)
        refused([*command, f"--out={tmp_path / name}"], trap, capsys, tmp_path)
        with pytest.raises(InputError, match=REFUSED):
            write_output_file(tmp_path / name, b"new")
        shutil.rmtree(trap) if trap.is_dir() else trap.unlink()


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def assert_untouched(elsewhere: Path, before: Content, resumed: Path, match: str = REFUSED) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=match):
            resume(resumed, progress=False)
        assert content(elsewhere) == before


def traps_in(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``, and the names under which it would be built."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path
            yield path.with_name(f"{path.name}.new")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "CHUNK", 64)
    monkeypatch.setattr(in_place, "SEGMENT", 700)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_links_among_the_files_of_an_unfinished_journal(
    link: Callable[[Path, Path], None], inputs: Inputs, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inputs["model"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(in_place, "describe_output", stop)
        apply(*inputs.checkpoints, rule="tv", in_place=True, progress=False)
    journal = model / ".perta-journal"
    before, shards = content(elsewhere), {path: path.read_bytes() for path in model.glob("*.safetensors")}
    written = {path.name for path in journal.iterdir()} - {"config.json", "model.safetensors.index.json"}
    assert {"job.json", "applying", "segment-0"} <= written
    for name in sorted({*written, *(f"{name}.new" for name in written), "sealed", "sealed.new", "README.md", "x"}):
        trap, kept = journal / name, journal.parent / "kept"
        if trap.exists():
            trap.rename(kept)
        link(trap, elsewhere / "job.json")
        assert_untouched(elsewhere, before, model)
        trap.unlink()
        if kept.exists():
            kept.rename(trap)
    assert {path: path.read_bytes() for path in shards} == shards
    resume(model, progress=False)
    found = read_checkpoint(model)
    assert all(same_bytes(found[name], tensor) for name, tensor in inputs.expected(None, 1.0).items())


@pytest.mark.usefixtures("small")
def test_a_shard_that_became_a_link_is_not_written(
    inputs: Inputs, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inputs["model"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(in_place, "describe_output", stop)
        apply(*inputs.checkpoints, rule="tv", in_place=True, progress=False)
    shard = sorted(model.glob("*.safetensors"))[0]
    shutil.copyfile(shard, elsewhere / "shard")
    shard.rename(model.parent / "kept")
    for link in (Path.symlink_to, Path.hardlink_to):
        link(shard, elsewhere / "shard")
        before = content(elsewhere)
        assert_untouched(elsewhere, before, model, "is a link to a file that others may use .*put a copy in its place")
        shard.unlink()
    (model.parent / "kept").rename(shard)
    resume(model, progress=False)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", ["plain", "streamed", "sweep"])
def test_links_among_the_files_of_an_unfinished_output(
    how: str, job: Job, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        if how == "plain":
            patch.setattr(to_directory, "write_model_card", stop)
            apply(*job.checkpoints, rule="tv", out=out, progress=False)
        elif how == "streamed":
            record, calls = WriteBehind._record, []

            def stop_later(writing: WriteBehind, done: int, *rest: Any) -> None:
                record(writing, done, *rest)
                calls.append(done)
                if len(calls) == 4:
                    raise KeyboardInterrupt

            patch.setattr(WriteBehind, "_record", stop_later)
            unlearn(
                *job.checkpoints,
                job.forget,
                job.retain,
                out=out,
                save_importance=kept,
                stream=True,
                progress=False,
                lam=1.0,
                rule="fisher",
            )
        else:
            score, scored = ScoredModel.score, []

            def stop_at_the_second(model: ScoredModel, name: str) -> Any:
                scored.append(name)
                return stop() if len(scored) > 2 else score(model, name)

            patch.setattr(ScoredModel, "score", stop_at_the_second)
            sweep(*job.checkpoints, job.forget, job.retain, lams=[1, 2], out=out, progress=False)
    partial = tmp_path / ".out.perta-partial"
    before = content(elsewhere)
    traps = [*traps_in(partial), partial / "sweep.json", partial / "sweep.png", partial / "README.md"]
    if how == "streamed":
        assert any("scratch" in trap.parts for trap in traps)
        traps += traps_in(tmp_path / ".kept.perta-partial")
    for trap in traps:
        aside = tmp_path / "aside"
        if trap.exists():
            trap.rename(aside)
        trap.symlink_to(elsewhere / "job.json")
        with pytest.raises(InputError):
            resume(out, progress=False)
        assert content(elsewhere) == before, trap
        trap.unlink()
        if aside.exists():
            aside.rename(trap)
    for directory in [partial, *(path for path in sorted(partial.rglob("*")) if path.is_dir())]:
        aside = tmp_path / "aside"
        directory.rename(aside)
        directory.symlink_to(aside)
        moved = content(aside)
        with pytest.raises(InputError, match=REFUSED):
            resume(out, progress=False)
        assert content(aside) == moved
        directory.unlink()
        aside.rename(directory)
    resume(out, progress=False)
    assert not partial.exists()


def test_a_record_cannot_make_resume_replace_what_no_run_wrote(job: Job, elsewhere: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = perta(
        *(
            "unlearn",
            "--rule=fisher",
            "--model",
            job.model,
            "--base",
            job.base,
            "--tuned",
            job.tuned,
            "--lam",
            1,
            "--stream",
        ),
        *("--forget", job.forget, "--retain", job.retain, "--out", out),
        setup=signal_at("SIGKILL", "streaming.streamed_run.resume_walk"),
    )
    assert process.returncode == -9
    path = tmp_path / ".out.perta-partial" / ".perta-run" / "job.json"
    record, before = read_record(path), content(elsewhere)
    write_record(path, record | {"stream": record["stream"] | {"save": str(elsewhere), "overwrite_saved": True}})
    with pytest.raises(InputError, match=r"elsewhere: holds what no run has written; move it away"):
        resume(out, progress=False)
    assert content(elsewhere) == before
    write_record(path, record)
    resume(out, progress=False)


def test_a_record_behind_a_link_is_not_removed(inputs: Inputs, elsewhere: Path, tmp_path: Path) -> None:
    """A run that starts over removes the records of the one before first."""
    before = content(elsewhere)
    for state in (".perta-run", ".perta-sweep", ".perta-tuning", ".perta-preconditioning"):
        (tmp_path / ".out.perta-partial").mkdir()
        (tmp_path / ".out.perta-partial" / state).symlink_to(elsewhere)
        apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", overwrite=True, progress=False)
        assert content(elsewhere) == before


@pytest.mark.parametrize("state", [".perta-run", ".perta-sweep", ".perta-tuning"])
def test_what_a_finished_run_leaves_is_no_link(
    state: str, inputs: Inputs, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    apply(*inputs.checkpoints, rule="tv", out=out, progress=False)
    (tmp_path / ".out.perta-replaced").mkdir()
    for kind in ("link", "relative link", "link to a file", "file", "pipe"):
        TRAPS[kind](out / state, elsewhere)
        refused(["resume", out], out / state, capsys, tmp_path)
        (out / state).unlink()


def test_a_file_is_opened_through_no_link_from_the_first_hidden_name_on(elsewhere: Path, tmp_path: Path) -> None:
    before = content(elsewhere)
    (tmp_path / "seen").symlink_to(elsewhere)
    write_file(tmp_path / "seen" / "new", b"")  # a directory of the user's own
    (elsewhere / "new").unlink()
    hidden = tmp_path / ".x.perta-partial"
    hidden.mkdir()
    (hidden / "below").symlink_to(elsewhere)
    (hidden / "file").symlink_to(elsewhere / "job.json")
    os.link(elsewhere / "job.json", hidden / "second")
    for path in ("below/job.json", "below/new", "file", "second"):
        with pytest.raises(InputError, match=REFUSED):
            own_file(hidden / path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    assert content(elsewhere) == before


def test_what_belongs_to_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / ".x.perta-partial"
    hidden.mkdir()
    (hidden / "file").write_text("mine")
    check_own(hidden)
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    os.chown(hidden, 12345, -1)
    monkeypatch.setattr(own.os, "geteuid", lambda: 54321)
    with pytest.raises(InputError, match=r"belongs to another user \(number 12345\)"):
        check_own(hidden)
    os.chown(tmp_path, 12345, -1)  # who could replace it anyway
    check_own(hidden)


def test_what_a_run_makes_itself_is_its_own(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the file system gives it to somebody else, as NFS may if root makes it. Weights may be a group's."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    for folder in (tmp_path, inputs["model"]):
        os.chown(folder, 111, -1)
    for shard in inputs["model"].iterdir():
        os.chown(shard, 222, -1)
    make = os.mkdir, os.open

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make[0](path, mode, dir_fd=dir_fd)
        os.chown(path, 333, -1, dir_fd=dir_fd)

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = make[1](path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_EXCL:
            os.fchown(descriptor, 333, -1)
        return descriptor

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(own.os, "geteuid", lambda: 444)
    apply(*inputs.checkpoints, rule="tv", out=tmp_path / "out", progress=False)
    apply(*inputs.checkpoints, rule="tv", in_place=True, progress=False)
    write_output_file(tmp_path / "scores.json", b"new")
    found = read_checkpoint(inputs["model"])
    assert all(same_bytes(tensor, found[name]) for name, tensor in read_checkpoint(tmp_path / "out").items())


@pytest.fixture
def bound(tmp_path: Path, elsewhere: Path) -> Iterator[Callable[[Path], None]]:
    """Binds ``elsewhere`` to a directory that it makes."""
    made: list[Path] = []

    def bind(path: Path) -> None:
        path.mkdir()
        if run_child(["mount", "--bind", elsewhere, path]).returncode != 0:
            pytest.skip("mounting is not permitted here")
        made.append(path)

    yield bind
    for path in made:
        run_child(["umount", path], check=True)


@pytest.mark.parametrize("name", ["model/.perta-journal", ".out.perta-partial"])
def test_a_mount_under_a_hidden_name(
    name: str, inputs: Inputs, bound: Callable[[Path], None], elsewhere: Path, tmp_path: Path
) -> None:
    bound(tmp_path / "inputs" / name if "model" in name else tmp_path / name)
    before = content(elsewhere)
    settings: dict[str, Any] = {"in_place": True} if "model" in name else {"out": tmp_path / "out"}
    with pytest.raises(InputError, match=r"is, or holds, a mount point"):
        apply(*inputs.checkpoints, rule="tv", progress=False, **settings)
    assert content(elsewhere) == before

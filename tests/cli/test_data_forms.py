"""Every command that takes data takes it in other forms and under other names of fields, with the same result."""

import csv
import inspect
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from perta_fast import Importance, InputError, cli, sweep, tune, unlearn
from perta_fast.records.report import Report
from perta_fast.records.typed_json import typed
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.results import Sweep
from tests.support.checkpoints import fingerprint
from tests.support.models import FORGET, RETAIN, Job, write_job

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

FIELDS = "question=title,answer=reply"
SAID = "title as question, reply as answer"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def other(job: Job) -> Job:
    """The same job, whose data is CSV with names of its own."""
    folder = job.forget.parent
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["title", "reply", "text"])
            writer.writerows([row["question"], row["answer"], "of no use"] for row in rows)
    return Job(*job.checkpoints, folder / "forget.csv", folder / "retain.csv")


def run(*arguments: object) -> int:
    return cli.main(list(map(str, arguments)))


def whole(command: str, job: Job, *others: object) -> list[object]:
    model, base, tuned = job.checkpoints
    return [command, "--model", model, "--base", base, "--tuned", tuned, "--forget", job.forget, "--retain", job.retain,
            *others]  # fmt: skip


def same_weights(one: Path, other: Path) -> bool:
    names = [path.name for path in one.glob("*.safetensors")]
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_unlearn_and_its_recipe(job: Job, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*whole("unlearn", job, "--rule=fisher", "--lam", 1, "--out", tmp_path / "plain")) == 0
    assert " data: " not in capsys.readouterr().out
    assert (
        run(*whole("unlearn", other, "--rule=fisher", "--fields", FIELDS, "--lam", 1, "--out", tmp_path / "other")) == 0
    )
    assert f"forget data: {SAID}\nretain data: {SAID}\n" in capsys.readouterr().out
    assert same_weights(tmp_path / "plain", tmp_path / "other")
    plain, report = Report.load(tmp_path / "plain"), Report.load(tmp_path / "other")
    assert "read_as" not in plain.data["forget"]
    assert report.data["forget"]["read_as"] == SAID
    assert report.recipe["fields"] == FIELDS
    again = ["unlearn", "--recipe", tmp_path / "other" / "perta_report.json", "--out", tmp_path / "again"]
    assert run(*again) == 0
    assert same_weights(tmp_path / "plain", tmp_path / "again")
    assert run("verify", tmp_path / "other") == 0
    written = whole("unlearn", other, "--rule", "fisher", "--lam", 1, "--out", tmp_path / "written")
    keys = dict(zip((str(key).removeprefix("--") for key in written[1::2]), map(str, written[2::2]), strict=True))
    (tmp_path / "run.yaml").write_text(json.dumps(keys | {"fields": FIELDS}))
    assert run("recipe", "check", tmp_path / "run.yaml") == 0
    assert run("unlearn", "--recipe", tmp_path / "run.yaml") == 0
    assert same_weights(tmp_path / "plain", tmp_path / "written")


def test_unlearn_streamed(job: Job, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            *whole(
                "unlearn", other, "--rule=fisher", "--fields", FIELDS, "--lam", 1, "--stream", "--out", tmp_path / "out"
            )
        )
        == 0
    )
    assert f"retain data: {SAID}" in capsys.readouterr().out
    kept = ["--fields", FIELDS, "--lam", 1, "--save-importance", tmp_path / "kept", "--out", tmp_path / "third"]
    for more in ([], ["--stream", "--overwrite"]):
        assert run(*whole("unlearn", other, "--rule=fisher", *kept, *more)) == 0
        assert Importance.load(tmp_path / "kept" / "retain").metadata.read_as == SAID
    capsys.readouterr()
    dry = ["--fields", FIELDS, "--lam", 1, "--stream", "--dry-run", "--out", tmp_path / "dry"]
    assert run(*whole("unlearn", other, "--rule=fisher", *dry)) == 0
    assert f"data: {len(FORGET)} forget samples" in capsys.readouterr().out


def test_importance(job: Job, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("importance", "--model", job.base, "--data", job.forget, "--out", tmp_path / "plain") == 0
    capsys.readouterr()
    for more in ([], ["--stream"]):
        out = tmp_path / f"other{len(more)}"
        arguments = ["--model", job.base, "--data", other.forget, "--fields", FIELDS, "--out", out, *more]
        assert run("importance", *arguments) == 0
        assert f"\ndata: {SAID}\n" in capsys.readouterr().out


def test_tune(job: Job, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--epochs", 1, "--rank", 2]
    assert run("tune", "--base", job.base, "--forget", job.forget, *short, "--out", tmp_path / "plain") == 0
    capsys.readouterr()
    other_data = ["--forget", other.forget, "--fields", FIELDS]
    assert run("tune", "--base", job.base, *other_data, *short, "--out", tmp_path / "other") == 0
    assert f"forget data: {SAID}\n" in capsys.readouterr().out
    assert same_weights(tmp_path / "plain", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "perta_tune.json").read_text())["data"]["read_as"] == SAID


def test_sweep(job: Job, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*whole("sweep", job, "--lams", "1", "--out", tmp_path / "plain")) == 0
    capsys.readouterr()
    assert run(*whole("sweep", other, "--fields", FIELDS, "--lams", "1", "--out", tmp_path / "other")) == 0
    shown = capsys.readouterr().out
    assert f"forget data: {SAID}" in shown
    found = [Sweep.read(tmp_path / name / "sweep.json") for name in ("plain", "other")]
    assert found[0].rows[1].forget_loss == found[1].rows[1].forget_loss
    assert found[1].data["retain"]["read_as"] == SAID
    command = next(line for line in shown.splitlines() if line.startswith("perta unlearn"))
    assert f"--fields {FIELDS} " in command
    words = [word.replace("DIR", str(tmp_path / "made")).replace("L", "1") for word in shlex.split(command)[1:]]
    assert run(*words) == 0


def test_eval(job: Job, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--max-new-tokens", 1, "--metrics", "forget_Q_A_Prob", "--out"]
    assert run("eval", "--model", job.model, "--forget", job.forget, *shared, tmp_path / "plain.json") == 0
    capsys.readouterr()
    data = ["--forget", other.forget, "--fields", FIELDS]
    assert run("eval", "--model", job.model, *data, *shared, tmp_path / "other.json") == 0
    assert f"forget data: {SAID}\n" in capsys.readouterr().out
    plain, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "other"))
    assert plain["metrics"] == found["metrics"]
    assert found["data"]["forget"]["read_as"] == SAID
    assert run("eval", "--model", job.model, "--suite", "tofu", "--data", tmp_path, "--fields", FIELDS) == 2
    assert "the suite has its own names of fields" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("question=title,answer=no", 'no row has "no", which --fields names; they have "title", "reply", "text"'),
        ("prompt=title", "argument --fields: has prompt=title; write it like question=prompt"),
        ("question=a,question=b", "argument --fields: is 'question=a,question=b'; it names one thing twice"),
        ("title", "argument --fields: has title=; write it like question=prompt"),
    ],
)
def test_bad_fields(fields: str, said: str, other: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(tmp_path)
    try:
        status = run(
            *whole("unlearn", other, "--rule=fisher", "--fields", fields, "--lam", 1, "--out", tmp_path / "out")
        )
    except SystemExit as stopped:  # argparse
        status = int(str(stopped.code))
    assert status == 2
    assert said in capsys.readouterr().err
    assert fingerprint(tmp_path) == before


def test_shards_of_a_directory(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = job.forget.read_text().splitlines(keepends=True)
    (tmp_path / "set").mkdir()
    shards = [tmp_path / "set" / f"train-0000{k}-of-00002.jsonl" for k in range(2)]
    shards[0].write_text("".join(lines[:2]))
    shards[1].write_text("".join(lines[2:]))
    unlearn(
        *job.checkpoints,
        f"{tmp_path}/set:train",
        job.retain,
        out=tmp_path / "out",
        progress=False,
        lam=1.0,
        rule="fisher",
    )
    unlearn(*job.checkpoints, job.forget, job.retain, out=tmp_path / "plain", progress=False, lam=1.0, rule="fisher")
    assert same_weights(tmp_path / "out", tmp_path / "plain")
    report, plain = Report.load(tmp_path / "out"), Report.load(tmp_path / "plain")
    assert report.data["forget"] == plain.data["forget"] | {"path": f"{tmp_path}/set:train"}
    assert run("verify", tmp_path / "out") == 0
    assert "changed" not in capsys.readouterr().out
    shards[1].write_text("".join(lines[3:]))
    assert run("verify", tmp_path / "out") == 0
    assert f"forget data {tmp_path}/set:train" in capsys.readouterr().out
    shards[1].unlink()
    shards[0].unlink()
    assert run("verify", tmp_path / "out") == 0
    assert "forget data: " in capsys.readouterr().out


def test_a_sweep_with_fields_is_read_back(other: Job) -> None:
    arguments = {name: parameter.default for name, parameter in inspect.signature(sweep).parameters.items()}
    paths = dict(zip(("model", "base", "tuned", "forget", "retain"), vars(other).values(), strict=True))
    request = Request.of(arguments | paths | {"fields": {"question": "title", "answer": "reply"}})
    assert typed(json.loads(json.dumps(asdict(request))), Request) == request


def test_a_directory_that_holds_the_output_is_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(job.forget.read_bytes())
    with pytest.raises(InputError, match=r"is or contains the input .*train\.jsonl"):
        unlearn(
            *job.checkpoints,
            f"{tmp_path}/set:train",
            job.retain,
            out=tmp_path / "set",
            overwrite=True,
            lam=1.0,
            rule="fisher",
        )
    with pytest.raises(InputError, match=r"is or contains the input .*train\.jsonl"):
        tune(job.base, tmp_path / "set", tmp_path / "set", overwrite=True)

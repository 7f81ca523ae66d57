"""What is wrong with arguments or data is said before torch is imported, which takes seconds."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.children import run_child
from tests.support.models import Job, write_lines

# Runs commands in one process, and prints the status of each with what it has imported by then.
_RUNS = """
import json, sys
from perta_fast import cli
for arguments in json.loads(sys.argv[1]):
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    print(json.dumps([status, [name for name in sys.argv[2:] if name in sys.modules]]))
"""
_NUMBERS = {
    "apply": ["--lam=nan", "--p=0", "--threads=0", "--threshold=2"],
    "importance": ["--batch-size=0", "--max-length=0", "--device=gpu", "--memory=1GiB", "--date-string=soon"],
    "merge": ["--threads=no"],
    "precondition": ["--batch-size=0", "--mu=-1", "--device=gpu", "--memory=1GiB", "--date-string=soon"],
    "ratio": ["--importance-dtype=float64"],
    "unlearn": ["--batch-size=0", "--max-length=0", "--lam=nan", "--threads=0", "--device=gpu", "--p=0", "--as=ratio"],
    "unlearn --choose max-retain-rise": ["--batch-size=0", "--lams=nan", "--threads=0", "--mus=-1", "--link-unchanged"],
    "sweep": [
        *("--batch-size=0", "--max-length=0", "--device=gpu", "--threads=0", "--date-string=soon", "--memory=1GiB"),
        *("--alphas=-1", "--mu=-1", "--metric=x", "--select=closest", "--retain-floor=1", "--checkpoint=kept"),
        *("--forget-importance=nowhere", "--save-importance=kept", "--gold=nowhere", "--also=nowhere.jsonl"),
    ],
    "sweep --stream": ["--batch-size=0", "--lams=0", "--metric=Q_A_ROUGE", "--holdout=nowhere.jsonl", "--also=forget"],
    "eval": [
        *("--batch-size=0", "--max-length=0", "--device=gpu", "--date-string=soon", "--memory=1GiB", "--suite=tofu"),
        *("--min-k=0", "--metrics=privleak", "--stress=int5", "--against=nowhere", "--max-new-tokens=0", "--data=x"),
        *("--compatible=x", "--reference=nowhere.json", "--reference-model=nowhere", "--holdout=nowhere.jsonl"),
    ],
    "eval --stream": ["--stress=int8", "--lm-eval=arc_easy", "--metrics=forget_Q_A_ROUGE", "--out=result.txt"],
    "tune": [
        *("--batch-size=0", "--max-length=0", "--device=gpu", "--device=cuda:1", "--date-string=soon", "--rank=0"),
        *("--epochs=0", "--lr=0", "--seed=-1", "--retain-kl=1", "--retain=forget.jsonl"),
    ],
    "tune --full": ["--lr=nan", "--seed=x"],
}
# The checkpoints that transformers loads in each command of ``whole``; arithmetic needs no configuration.
_LOADED = {
    "importance": ["--model"],
    "precondition": ["--base"],
    "tune": ["--base"],
    "unlearn": ["--base"],
    "unlearn --choose max-retain-rise": ["--model"],
    "sweep": ["--model"],
    "eval": ["--model", "--reference-model"],
}


def whole(command: str, job: Job, out: Path) -> dict[str, list[object]]:
    """The options of a run that is right, but for the importances of perta ratio."""
    weights: dict[str, list[object]] = {"--model": [job.model], "--base": [job.base], "--tuned": [job.tuned]}
    data: dict[str, list[object]] = {"--forget": [job.forget], "--retain": [job.retain]}
    made: dict[str, list[object]] = {"--out": [out]}
    return {
        "apply": weights | {"--rule": ["tv"]} | made,
        "importance": {"--model": [job.base], "--data": [job.forget]} | made,
        "merge": {"--base": [job.base], "--tuned": [job.tuned]} | made,
        "precondition": {"--base": [job.base], "--tuned": [job.tuned], "--retain": [job.retain]} | made,
        "ratio": {"--forget-importance": [job.base], "--retain-importance": [job.base]} | made,
        "unlearn": weights | data | {"--rule": ["grad"], "--lam": ["1"]} | made,
        "unlearn --choose max-retain-rise": weights | data | made,
        "sweep": weights | data | {"--lams": ["1"]} | made,
        "sweep --stream": weights | data | {"--lams": ["1"]} | made,
        "tune": {"--base": [job.base], "--forget": [job.forget]} | made,
        "tune --full": {"--base": [job.base], "--forget": [job.forget]} | made,
        "eval": {"--model": [job.model]} | data | {"--out": [f"{out}.json"]},
        "eval --stream": {"--model": [job.model]} | data | {"--out": [f"{out}.json"]},
    }[command]


def words_of(options: dict[str, list[object]]) -> list[str]:
    """Options as they are typed."""
    return [str(word) for option, values in options.items() for word in (option, *values)]


def refusals(command: str, job: Job, folder: Path) -> list[list[str]]:
    """Wrong forms of a command."""
    good = whole(command, job, folder / "out")
    words = words_of(good)
    cases = [[*words, more] for more in _NUMBERS[command]]
    cases += [[*words, "--no-such-option"], words[2:]]
    taken, empty, wrong = folder / "taken", folder / "empty", folder / "wrong.jsonl"
    for path in (taken / "file.json", empty / "none"):
        path.parent.mkdir()
    (taken / "file.json").write_text("")
    write_lines(wrong, [{"question": "a", "answer": "b"}] * 3 + [{"question": "an answer is missing"}])
    places = {str(folder / "out"): str(taken), f"{folder}/out.json": f"{taken}/file.json"}
    cases.append([places.get(word, word) for word in words])
    directories = {"--model", "--base", "--tuned", "--forget-importance", "--retain-importance"}
    for option in good.keys() & directories:
        cases += [[*words, f"{option}={path}"] for path in (folder / "nowhere", empty)]
    for name, config in (("damaged", '{"model_type":'), ("table", "[]")) if command != "ratio" else ():
        copy = shutil.copytree(job.base, folder / name)
        (copy / "config.json").write_text(config)
        cases += [[*words, f"{option}={copy}"] for option in good.keys() & {"--model", "--base"}]
    bare = shutil.copytree(job.base, folder / "bare")
    (bare / "config.json").unlink()
    cases += [[*words, f"{option}={bare}"] for option in _LOADED.get(command, _LOADED.get(command.split()[0], []))]
    if "--retain" in good and not command.startswith("eval"):  # which takes the one or the other
        without = words_of({option: values for option, values in good.items() if option != "--retain"})
        cases += [without, *([[*without, "--rule=preconditioned"]] if command == "unlearn" else [])]
    for option in good.keys() & {"--forget", "--retain", "--data"}:
        cases += [[*words, f"{option}={path}"] for path in (folder / "nowhere.jsonl", wrong)]
        cases.append([*words, "--fields=question=prompt,answer=completion"])
    return cases


def assert_refused_early(commands: list[list[str]], late: tuple[str, ...] = ("torch", "transformers")) -> None:
    """Each command ends with status 2, one line, and without the modules ``late``."""
    done = run_child([sys.executable, "-c", _RUNS, json.dumps(commands), *late])
    assert done.returncode == 0, done.stderr
    for command, line in zip(commands, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [2, []], (command, done.stderr)
    assert done.stderr.count("error: ") == len(commands) == len(done.stderr.splitlines())


@pytest.mark.parametrize("command", _NUMBERS)
def test_wrong_arguments_and_data(command: str, job: Job, tmp_path: Path) -> None:
    assert_refused_early([[*command.split(), *words] for words in refusals(command, job, tmp_path)])
    assert not (tmp_path / "out").exists()


def test_numpy_waits_until_weights_are_read(job: Job, tmp_path: Path) -> None:
    """It takes as long as all else that a refusal needs; and only a recipe needs YAML."""
    commands, nowhere = [], str(tmp_path / "nowhere")
    for name, wrong in _NUMBERS.items():
        good = whole(name, job, tmp_path / "out")
        commands.append([*name.split(), *words_of(good), wrong[0]])
        place = good.keys() & {"--model", "--base", "--forget-importance"}
        place |= good.keys() & {"--forget", "--retain", "--data"}
        commands += [[*name.split(), *words_of(good), f"{option}={nowhere}"] for option in sorted(place)]
    commands += [[name, nowhere] for name in ("inspect", "verify", "resume")]
    commands.append(["report", nowhere, "--out", f"{nowhere}.html"])
    late = ("numpy", "importlib.metadata", "torch", "transformers")
    assert_refused_early(commands, (*late, "yaml"))
    assert_refused_early([["recipe", "run", nowhere]], late)


@pytest.mark.parametrize("more", [["--dry-run", "--stream"], ["--show-labels=1"]])
def test_what_makes_nothing(more: list[str], job: Job, tmp_path: Path) -> None:
    commands, nowhere = [], tmp_path / "nowhere"
    for name in ("importance", "precondition", "unlearn", "unlearn --choose max-retain-rise", "sweep", "eval"):
        good = whole(name, job, tmp_path / "out")
        words = [*name.split(), *words_of(good), *more]
        commands += [[*words, f"{option}={nowhere}"] for option in ("--data", "--retain", "--forget") if option in good]
        commands.append([*words, *(f"{option}={nowhere}" for option in ("--model", "--base") if option in good)])
    assert_refused_early(commands)


def test_what_only_reads(job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("nowhere", "empty")]
    commands = [[command, path] for command in ("inspect", "verify", "resume") for path in paths]
    commands += [["report", path, "--out", str(tmp_path / "page.html")] for path in paths]
    commands += [["recipe", "check", paths[0]], ["recipe", "run", paths[0]], ["unlearn", "--recipe", paths[0]]]
    assert_refused_early(commands)


def test_help_imports_little() -> None:
    """Each of these would be a part of its tenth of a second."""
    late = ["torch", "transformers", "numpy", "yaml", "blake3", "ctypes", "logging", "json", "difflib", "datetime"]
    late += [f"perta_fast.{module}" for module in ("files.new_directory", "files.hub", "data.forms", "memory")]
    said = "import sys; from perta_fast import cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = run_child([sys.executable, "-c", said, *late])
    assert done.stdout == "[]\n", done.stderr

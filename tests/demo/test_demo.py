"""The demo end to end, in its fast form: same seed, same numbers, all of them those of the files it kept."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast import verify
from perta_fast.cli import main
from perta_fast.demo import run, run_demo
from perta_fast.demo.files import work_directory
from perta_fast.demo.settings import FAST

RULES = ("tv", "grad", "fisher", "empirical-fisher", "preconditioned")
SPLITS = ("forget", "retain", "forget_rephrased", "retain_rephrased")
CHECKPOINTS = {"theta_full": "full", "theta_0": "base", "gold": "gold"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo."""
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def printed(folder: Path) -> Iterator[str]:
    """What the demo in ``folder`` prints."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        run_demo(folder, fast=True, seed=3)
    yield "\n".join(lines)


@pytest.fixture(scope="module")
def results(folder: Path, printed: str) -> dict[str, Any]:
    """Its ``demo.json``."""
    found: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    return found


def place(folder: Path, line: dict[str, Any]) -> Path:
    if line["name"] in CHECKPOINTS:
        return folder / CHECKPOINTS[line["name"]]
    return folder / "unlearned" / f"{line['name']}-{line['lam']:g}"


def test_the_same_seed_gives_the_same_numbers(
    tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Quietly too: then the results are all that is printed."""
    assert main(["demo", "--fast", "--seed=3", "--quiet", "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.split()[:4] == ["forget", "retain", "forget", "retain"]  # the head of the table
    again = json.loads((tmp_path / "again" / "demo.json").read_text())
    assert again.pop("seconds").keys() == results["seconds"].keys()
    assert again == {key: value for key, value in results.items() if key != "seconds"}


def test_the_table_has_all_models(results: dict[str, Any]) -> None:
    assert [line["name"] for line in results["table"]] == [*CHECKPOINTS, *RULES]


def test_scores_are_those_of_the_kept_checkpoints(folder: Path, results: dict[str, Any]) -> None:
    for line in results["table"]:
        path = place(folder, line)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for split in SPLITS:
            rows = [json.loads(text) for text in (folder / f"{split}.jsonl").read_text().splitlines()]
            answers = [answer_alone(model, tokenizer, row) for row in rows]
            found = line["scores"][split]
            assert found["questions"] == len(rows)
            assert found["loss"] == pytest.approx(sum(loss for loss, _ in answers) / len(rows), rel=1e-4)
            # Two ways to sum may round apart where two tokens are all but equally likely.
            exact = sum(right for _, right in answers)
            assert abs(found["accuracy"] * len(rows) / 100 - exact) < 1.5


@torch.no_grad()
def answer_alone(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, bool]:
    """Loss by transformers, and whether each answer token is the likeliest; without padding or batches."""
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    whole = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}<eos>")["input_ids"]
    ids = torch.tensor([whole])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    output = model(input_ids=ids, labels=labels)
    predicted = output.logits[0, len(prompt) - 1 : -1].argmax(-1)
    return output.loss.item(), torch.equal(predicted, ids[0, len(prompt) :])


def test_theta_full_knows_both_sets_and_the_others_what_they_were_taught(results: dict[str, Any]) -> None:
    accuracy = {
        line["name"]: {split: line["scores"][split]["accuracy"] for split in SPLITS} for line in results["table"]
    }
    for split in ("forget", "retain"):
        assert accuracy["theta_full"][split] > accuracy["theta_0"][split] + 50
    assert accuracy["gold"]["retain"] > accuracy["gold"]["forget"] + 50


def test_each_row_is_its_rules_best_and_is_what_the_rule_gives(folder: Path, results: dict[str, Any]) -> None:
    by_name = {line["name"]: line for line in results["table"]}
    gold = by_name["gold"]["scores"]
    for rule in RULES:
        tried, line = results["runs"][rule], by_name[rule]
        assert [each["lam"] for each in tried] == list(FAST.lams_of(rule))
        for each in tried:
            forgetting = abs(each["forget"]["accuracy"] - gold["forget"]["accuracy"])
            lacking = max(0, gold["retain"]["accuracy"] - each["retain"]["accuracy"])
            assert each["gap"] == pytest.approx(forgetting + lacking)
        (best,) = [each for each in tried if each["lam"] == line["lam"]]
        assert line["gap"] == best["gap"] == min(each["gap"] for each in tried)
        assert all(line["scores"][split] == best[split] for split in ("forget", "retain"))
        report = json.loads((place(folder, line) / "perta_report.json").read_text())
        assert (report["rule"], report["lam"]) == ("tv" if rule == "preconditioned" else rule, line["lam"])
        found = verify(place(folder, line), full=True, progress=False)
        assert not found.problems
        assert not found.unchecked
    assert len(list((folder / "unlearned").iterdir())) == len(RULES)


def test_updates_are_those_of_the_kept_checkpoints(folder: Path, results: dict[str, Any]) -> None:
    def tensors(*parts: str) -> dict[str, torch.Tensor]:
        (path,) = folder.joinpath(*parts).glob("*.safetensors")
        return load_file(path)

    base, tuned, full = tensors("base"), tensors("tuned"), tensors("full")
    forget, retain = (tensors("importance", "empirical-fisher", role) for role in ("forget", "retain"))
    tau = torch.cat([(tuned[name] - base[name]).flatten() for name in base]).double()
    for line in results["table"]:
        if line["update"] is None:
            continue
        out = load_file(place(folder, line) / "model.safetensors")
        delta = torch.cat([(full[name] - out[name]).flatten() for name in base]).double()
        on_forget, on_retain = (
            sum((found[name] * (full[name] - out[name]) ** 2).sum().item() for name in base)
            for found in (forget, retain)
        )
        # The written result is rounded, the update in the table is not.
        assert line["update"]["length"] == pytest.approx((delta.norm() / tau.norm()).item(), rel=1e-3)
        assert line["update"]["selectivity"] == pytest.approx(on_forget / on_retain, rel=1e-2)


def test_what_is_printed_are_these_numbers(printed: str, results: dict[str, Any]) -> None:
    assert printed.startswith("questions: ")
    rows = {row.split()[0]: row.split() for row in printed.splitlines() if row.endswith(tuple("0123456789"))}
    for line in results["table"]:
        numbers = [
            text
            for split in SPLITS
            for text in (f"{line['scores'][split]['loss']:.3f}", f"{line['scores'][split]['accuracy']:.1f}", "%")
        ]
        lam = [] if line["lam"] is None else [f"{line['lam']:g}"]
        assert rows[line["name"]] == [line["name"], *lam, *numbers, f"{line['gap']:.1f}"]


def test_the_printed_command_repeats_a_row(folder: Path, printed: str, capsys: Any) -> None:
    (command,) = re.findall(r"^perta unlearn .*$", printed, re.MULTILINE)
    arguments = shlex.split(command)[1:]
    settings = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert main(arguments) == 0
    kept = folder / "unlearned" / f"{settings['--rule']}-{settings['--lam']}" / "model.safetensors"
    assert (Path(settings["--out"]) / "model.safetensors").read_bytes() == kept.read_bytes()


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("kept")
    assert main(["demo", "--fast", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("exists and is not empty; choose another directory\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_after_an_error_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: Any, *_: object) -> None:
        files.questions("forget").write_text("half a demo")
        raise OSError("no space left")

    monkeypatch.setattr(run, "train_models", fail)
    with pytest.raises(OSError, match="no space left"):
        run_demo(tmp_path / "out", fast=True)
    assert not list(tmp_path.iterdir())


def test_without_out_the_files_are_temporary() -> None:
    with work_directory(None) as directory:
        (directory / "file").write_text("soon gone")
    assert not directory.exists()

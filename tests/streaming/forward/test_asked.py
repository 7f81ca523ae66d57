"""What metrics ask of a model without weights, and what they are when its scores are found elsewhere."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perta_fast import evaluate
from perta_fast.data.samples import Sample
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.conventions import Conventions
from perta_fast.evaluation.examinee import Examinee
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.muse import MuseMetrics, read_muse
from perta_fast.evaluation.own_data import OwnData
from perta_fast.evaluation.tofu import TofuMetrics, read_tofu
from perta_fast.models.loading import Subject
from perta_fast.models.scores import TokenScores
from perta_fast.models.token_scores import score_rows
from perta_fast.streaming.forward.asked import Answering, Asking
from perta_fast.streaming.forward.sample_set import SampleSet
from tests.evaluation.test_suites import HOLDOUT, WORDS, write_muse, write_tofu
from tests.support.models import CHAT_TEMPLATE, FORGET, llama, tokenizer, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

TALK = [
    {
        "messages": [
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "The author number 3."},
        ]
    }
]


def examinee(kind: type[Examinee], module: Any, words: Any = WORDS, **settings: Any) -> Any:
    return kind(Subject(module, words, "nowhere"), 3, None, False, **settings)


def asked_of(table: MetricTable, names: list[str], words: Any = WORDS, **settings: Any) -> Asking:
    """What the metrics ask of a model that has no weights."""
    with torch.device("meta"):
        module = llama()
    asking = examinee(Asking, module, words, **settings)
    table.measure(asking, names)
    return asking


def found_by(module: Any, sets: dict[str, SampleSet]) -> dict[str, list[TokenScores]]:
    return {
        name: score_rows(module, asked.samples, batch_size=3, detailed=asked.detailed, hidden=asked.hidden)
        for name, asked in sets.items()
    }


def tables(folder: Path) -> dict[str, tuple[MetricTable, dict[str, Any], Any]]:
    """Each with the arguments of ``evaluate`` that give the same data, and the tokenizer."""
    own: dict[str, Any] = {
        "forget": write_lines(folder / "forget.jsonl", FORGET),
        "holdout": write_lines(folder / "holdout.jsonl", HOLDOUT),
    }
    talk: dict[str, Any] = {"forget": write_lines(folder / "talk.jsonl", TALK)}
    suites = {"tofu": folder / "tofu", "muse": folder / "muse"}
    for path in suites.values():
        path.mkdir()
    write_tofu(suites["tofu"])
    write_muse(suites["muse"])
    of_tofu = {"suite": "tofu", "data": suites["tofu"], "split": "forget01"}
    chat = tokenizer(CHAT_TEMPLATE)
    return {
        "tofu": (TofuMetrics(read_tofu(suites["tofu"], "forget01"), None), of_tofu, WORDS),
        "muse": (MuseMetrics(read_muse(suites["muse"]), None), {"suite": "muse", "data": suites["muse"]}, WORDS),
        "own": (OwnData({role: DataFile.read(path) for role, path in own.items()}, None), own, WORDS),
        "talk": (OwnData({role: DataFile.read(path) for role, path in talk.items()}, None), talk, chat),
    }


@pytest.mark.parametrize("which", ["tofu", "muse", "own", "talk"])
def test_asked_and_answered_is_measured(which: str, tmp_path: Path) -> None:
    table, arguments, words = tables(tmp_path)[which]
    names, _ = table.chosen_of_scores(None)
    asking = asked_of(table, names, words)
    module = llama(1).eval()
    answering = examinee(Answering, module, words, scores=found_by(module, asking.sets))
    found = table.measure(answering, names)
    live = evaluate(module, tokenizer=words, metrics=names, batch_size=3, progress=False, **arguments)
    assert found == live.metrics
    assert answering.notes == live.notes
    assert answering.prompt == live.settings["prompt"]
    assert answering.data == live.data


def test_what_is_asked_for(tmp_path: Path) -> None:
    table, *_ = tables(tmp_path)["tofu"]
    asking = asked_of(table, ["ra_Truth_Ratio", "extraction_strength"])
    assert {name: (asked.detailed, asked.hidden) for name, asked in asking.sets.items()} == {
        "ra": (False, None),
        "ra perturbed": (False, None),
        "forget": (True, None),
    }
    assert len(asking.sets["ra perturbed"].samples) == 12
    hidden = asked_of(table, ["extraction_strength"], conventions=Conventions.named("open-unlearning"))
    assert hidden.sets["forget"].hidden == WORDS.pad_token_id


def test_zeros_have_the_lengths_of_scores() -> None:
    row = [Sample((5, 6, 7, 8), (-100, -100, 7, 8), share=0.5), Sample((9, 5, 6), (9, 5, 6), share=0.5)]
    samples = [*row, Sample((5, 6), (-100, 6))]
    module = llama(1).eval()
    zeros = examinee(Asking, module).score(samples, "forget", detailed=True)
    for of_row, of_real in zip(zeros, score_rows(module, samples, batch_size=1, detailed=True), strict=True):
        for field in fields(TokenScores):
            zero, number = getattr(of_row, field.name), getattr(of_real, field.name)
            assert (zero.shape, zero.dtype) == (number.shape, number.dtype) and not zero.any()


def test_two_sets_of_one_name() -> None:
    asking = examinee(Asking, llama())
    sample = Sample((5, 6, 7), (-100, 6, 7))
    asking.score([sample], "forget")
    asking.score([sample], "forget")
    with pytest.raises(ValueError, match="two sets of samples have the name forget"):
        asking.score([sample], "forget", detailed=True)


def test_the_reference_model_is_asked_apart(tmp_path: Path) -> None:
    with torch.device("meta"):
        asking = examinee(Asking, llama())
    samples = [Sample((5, 6, 7), (-100, 6, 7))]
    zeros = asking.score_by(tmp_path, {"forget": samples, "holdout": samples})
    assert not asking.sets and list(asking.reference_sets) == ["forget", "holdout"]
    assert zeros["holdout"][0].log_probs.tolist() == [0, 0]
    scores = [TokenScores(np.array([-1, -2], dtype=np.float32))]
    answering = examinee(Answering, None, reference_scores={"forget": scores})
    assert answering.score_by(tmp_path, {"forget": samples}) == {"forget": scores}


def test_scores_that_are_not_finite_are_noted() -> None:
    scores = [TokenScores(np.array([math.nan], dtype=np.float32))]
    answering = examinee(Answering, None, scores={"forget": scores})
    assert answering.score([Sample((5, 6), (-100, 6))], "forget") is scores
    assert answering.notes == ["forget: the loss of 1 of 1 samples is not finite"]

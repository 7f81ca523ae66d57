"""TOFU's rows by their use in the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bench.study.real.settings import Settings
from bench.study.store import digest_of
from perta_fast.data.rows import evenly_spread
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import read_benchmark_file

ROWS_OF_AUTHOR = 20
Pair = dict[str, str]  # question and answer
_T = TypeVar("_T")


@dataclass(frozen=True)
class Choice:
    """A question with the answer that is right and those that are wrong."""

    question: str
    right: str
    wrong: Sequence[str]


@dataclass(frozen=True)
class Rows:
    """What theta_full is tuned on, ``forget`` and ``retain``, and the same facts in other words.

    reworded_answers, reworded_questions: forget rows with only the answer, or only the question, paraphrased.
    *_choices: paraphrased answers and wrong ones, of the forget and retain rows and of facts about the world.
    """

    forget: Sequence[Pair]
    retain: Sequence[Pair]
    reworded_answers: Sequence[Pair]
    reworded_questions: Sequence[Pair]
    forget_choices: Sequence[Choice]
    retain_choices: Sequence[Choice]
    world_choices: Sequence[Choice]

    @classmethod
    def read(cls, folder: Path, settings: Settings) -> Rows:
        """The first authors of forget10 are forgotten; retained are those of retain_perturbed, then the others.

        Raises InputError for a file that is missing, bad or too short.
        """
        reworded = ("question", "answer", "paraphrased_question", "paraphrased_answer")
        forget = read_benchmark_file(folder, "forget10_perturbed", reworded, ("perturbed_answer",))
        kept = read_benchmark_file(folder, "retain_perturbed", reworded, ("perturbed_answer",))
        others = read_benchmark_file(folder, "retain90", ("question", "answer"))
        world = read_benchmark_file(folder, "world_facts_perturbed", ("question", "answer"), ("perturbed_answer",))
        forgotten, retained = (ROWS_OF_AUTHOR * n for n in (settings.forgotten, settings.authors - settings.forgotten))
        first = [row.content for row in forget.rows[:forgotten]]
        of_kept = [row.content for row in kept.rows[:retained]]
        answers = {row.content["question"]: row.content["answer"] for row in kept.rows}
        more = [row.content for row in others.rows if row.content["answer"] != answers.get(row.content["question"])]
        rest = sorted(more, key=lambda row: row["question"] in answers)  # last one that an author of TOFU shares
        of_rest = rest[: retained - len(of_kept)]
        if len(first) < forgotten or len(of_kept) + len(of_rest) < retained:
            raise InputError(f"{folder}: has fewer than {settings.authors} authors, {settings.forgotten} to forget")
        return cls(
            _pairs(first),
            _pairs([*of_kept, *of_rest]),
            _pairs(first, answer="paraphrased_answer"),
            _pairs(first, question="paraphrased_question"),
            _choices(first, "paraphrased_answer"),
            _choices(of_kept, "paraphrased_answer"),
            _choices([row.content for row in world.rows], "answer"),
        )

    @cached_property
    def digest(self) -> str:
        """A short hash of all rows."""
        return digest_of(asdict(self))


def spread(rows: Sequence[_T], count: int) -> list[_T]:
    """At most ``count`` rows, evenly spread."""
    return [rows[k] for k in evenly_spread(len(rows), count)]


def _pairs(rows: Sequence[Mapping[str, Any]], question: str = "question", answer: str = "answer") -> list[Pair]:
    return [{"question": row[question], "answer": row[answer]} for row in rows]


def _choices(rows: Sequence[Mapping[str, Any]], right: str) -> list[Choice]:
    return [Choice(row["question"], row[right], list(row["perturbed_answer"])) for row in rows]

"""The answers of the model before and after the run to the same questions."""

from dataclasses import dataclass
from pathlib import Path

from perta_fast.data.chat import ChatSettings, Told
from perta_fast.data.forms import Fields, fields_from
from perta_fast.data.rows import Row, evenly_spread, load_rows
from perta_fast.errors import InputError
from perta_fast.progress import Progress
from perta_fast.records.report import Report
from perta_fast.reporting.evidence import why_not_as_recorded
from perta_fast.runs.checked_rows import read_again

_NEW_TOKENS = 200
_BATCH = 8
_OWN = {"forget": 2, "retain": 1}  # questions of the run's own data


Shown = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Answers:
    """Questions and their answers, in the same order. before: empty if that model is gone; ``why`` gives the reason.

    roles: "forget" or "retain" for the run's own rows, "" for others.
    """

    questions: list[str]
    truth: list[str]
    before: list[str]
    after: list[str]
    why: str | None
    roles: list[str]

    def shown(self) -> list[Shown]:
        """Of each question: its role, itself, the data's answer, and the answers before and after."""
        before = self.before or [f"(not asked: {self.why})"] * len(self.after)
        return list(zip(self.roles, self.questions, self.truth, before, self.after, strict=True))


def read_prompts(path: str | Path, fields: Fields | None = None) -> list[Row]:
    """Read questions and answers. Raises InputError, naming the line, for a row without a question."""
    rows = load_rows(path, fields)
    for row in rows:
        if "question" not in row.content:
            raise InputError(f'{row.where}: has no "question" to ask')
    return rows


def own_questions(report: Report) -> list[tuple[str, Row]]:
    """A few questions of the run's own data, each with its role. Raises InputError, saying why, if there are none."""
    given = report.recipe.get("fields")
    fields = None if given is None else fields_from(str(given))
    questions = []
    for role, count in _OWN.items():
        if role in report.data:
            rows = [row for row in read_again(report, role, fields) if "question" in row.content]
            questions += [(role, rows[k]) for k in evenly_spread(len(rows), count)] if rows else []
    if not questions:
        raise InputError("the run's data has no questions; give some with ‹prompts›")
    return questions


def answer_own(report: Report, run: Path, progress: Progress) -> Answers | str:
    """Ask both models questions of the run's own data; why not, if they or the data are not those of the run."""
    try:
        questions = own_questions(report)
        return answer_prompts(report, run, [row for _, row in questions], progress, [role for role, _ in questions])
    except InputError as error:
        return str(error)


def answer_prompts(
    report: Report, run: Path, prompts: list[Row], progress: Progress, roles: list[str] | None = None
) -> Answers:
    """Ask both models, one in memory at a time, greedily, up to 200 tokens.

    Raises InputError if the run's output has changed, or if a model cannot be loaded.
    """
    if reason := why_not_as_recorded({"path": str(run), "files": report.output["files"]}):
        raise InputError(f"{reason}; its answers would not be those of the run")
    before = report.inputs.get("model")
    chat = Told.read(report.settings).again()
    why = "the report names none" if before is None else why_not_as_recorded(before)
    return Answers(
        [row.content["question"] for row in prompts],
        [row.content["answer"] for row in prompts],
        [] if before is None or why else _ask(Path(before["path"]), prompts, chat, "before", progress),
        _ask(run, prompts, chat, "after", progress),
        why,
        roles or [""] * len(prompts),
    )


def _ask(model: Path, prompts: list[Row], chat: ChatSettings, name: str, progress: Progress) -> list[str]:
    from perta_fast.data.samples import prompt_of
    from perta_fast.models.greedy_answers import greedy_answers
    from perta_fast.models.loading import load_subject, samples_and_told
    from perta_fast.models.token_scores import evaluation_mode

    subject = load_subject(model, None, None, progress=progress)
    tokens = [prompt_of(sample) for sample in samples_and_told(subject, prompts, None, chat)[0]]
    with evaluation_mode(subject.module):
        return greedy_answers(
            subject.module,
            subject.tokenizer,
            tokens,
            batch_size=_BATCH,
            max_new_tokens=_NEW_TOKENS,
            progress=progress,
            description=f"answers {name}",
        )

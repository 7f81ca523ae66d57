"""The head of the page: what was asked of which model, what came of it, and whether the files are those of the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from perta_fast.data.given import IN_WORDS
from perta_fast.errors import shell_command
from perta_fast.files.hub import hub_name
from perta_fast.records.check import outcomes
from perta_fast.records.report import DataRecord, Report
from perta_fast.reporting.answers import Answers, Shown
from perta_fast.reporting.measured import CRITERIA, Measurement, chance, meaning, measured, number
from perta_fast.reporting.tensor_positions import element_count
from perta_fast.reporting.verified import Verified, in_words

_LIMIT = (
    "This says what the model answers now. It does not prove that its weights hold nothing more of the rows: "
    "perta eval with --stress looks at what rounding or a little tuning brings back."
)
_LONG = 400  # letters of a text
ASKED = 3  # questions at the head of the page; more come below
_TONES = {"Forgotten": "good", "Kept": "good", "Not forgotten": "bad", "Lost": "bad"}
_VECTOR = "What the model learns from the rows to forget alone is a change of its weights (a task vector)."
_MERGED = "The adapter was added to its base, in float32, and each value was rounded once to the type of the base."
_WHAT = {
    "tv": f"{_VECTOR} λ times this change was subtracted.",
    "preconditioned": f"{_VECTOR} The part of this change that acts on the rows to keep was made small, and λ times "
    "the rest was subtracted.",
    "": f"{_VECTOR} Each weight's part of it was scaled by how much the weight matters for the rows to forget rather "
    "than for those to keep, and λ times that was subtracted.",
}


@dataclass(frozen=True)
class Tile:
    """One part of the verdict. tone: ``good``, ``bad`` or ``open``."""

    title: str
    head: str
    tone: str
    line: str


@dataclass(frozen=True)
class Verdict:
    """Everything above the first fold. asked: pairs of a term and what it is. rows: of the table of numbers."""

    lead: str
    tiles: list[Tile]
    asked: list[tuple[str, str]]
    columns: list[str]
    rows: list[Sequence[str]]
    sentences: list[str]
    verified: Verified
    answers: list[Shown]
    no_answers: str
    command: str
    warnings: list[str]


def verdict(report: Report, run: Path, verified: Verified, answers: Answers | str | None) -> Verdict:
    """answers: None if nobody asked to see them, a text if there is a reason why they cannot be shown."""
    found = measured(report)
    changed = sum(row.changed for row in report.tensors)
    sentences = [] if report.merged else _sentences(found)
    elements = sum(element_count(row.shape) for row in report.tensors)
    sentences.append(f"{changed:,} of {elements:,} stored values differ from those of the {_before(report)}.")
    return Verdict(
        lead=_lead(report, changed),
        tiles=[*_tiles(report, found, changed), Tile("Files", verified.head, verified.tone, _files_line(verified))],
        asked=_asked(report, run),
        columns=["", "to be forgotten", "to be kept"],
        rows=[] if isinstance(found, str) else _numbers(found),
        sentences=sentences,
        verified=verified,
        answers=list(map(_short, answers.shown()[:ASKED])) if isinstance(answers, Answers) else [],
        no_answers=_no_answers(answers, report.merged),
        command="" if answers is not None else _command(report, run),
        warnings=report.warnings,
    )


def title(report: Report) -> str:
    """The title of the page, with the name of the model: of its directory, or on the hub."""
    path = Path(report.inputs["model"]["path"]) if "model" in report.inputs else Path("a model")
    what = "Report of a merge" if report.merged else "Unlearning report"
    return f"{what}: {hub_name(path) or path.name or path}"


def _before(report: Report) -> str:
    """What a sentence calls the checkpoint that was changed."""
    return "base" if report.merged else "model"


def _sentences(found: Measurement | str) -> list[str]:
    return [found] if isinstance(found, str) else [meaning(found), f"{found.how} {CRITERIA}", _LIMIT]


def _lead(report: Report, changed: int) -> str:
    if not changed:
        return f"Nothing was changed: every stored value is as in the {_before(report)}."
    when = f" on {report.finished[:10]}" if report.finished else ""
    if report.merged:
        return f"An adapter was merged into its base{when}. Nothing was to be forgotten."
    files = {role: f"the {data['samples']:,} {_named(data)}" for role, data in report.data.items()}
    if files.keys() >= {"forget", "retain"}:
        return f"The model was changed{when}, to make it forget {files['forget']} and keep {files['retain']}."
    return f"The model was changed{when}. {_files_or_none(files)}"


def _named(data: DataRecord) -> str:
    return f"rows of {Path(data['path']).name}" if data["path"] else IN_WORDS


def _located(data: DataRecord) -> str:
    return f"rows of {data['path']}" if data["path"] else IN_WORDS


def _files_or_none(files: dict[str, str]) -> str:
    if not files:
        return "No data was named, so this page can't say what was to be forgotten."
    return f"It was given {' and '.join(f'{name} ({role})' for role, name in files.items())}."


def _tiles(report: Report, found: Measurement | str, changed: int) -> list[Tile]:
    titles = {"forget": "To be forgotten", "retain": "To be kept"}
    if report.merged:
        tensors = report.action_counts().get("merged", 0)
        merged = Tile("Adapter", "Merged", "good", f"It changed {tensors:,} of {len(report.tensors):,} tensors.")
        return [merged if changed else Tile("Adapter", "Nothing changed", "bad", "The result holds the base's values.")]
    if not changed:
        return [Tile(titles["forget"], "Nothing changed", "bad", "The result holds the values of the model.")]
    if isinstance(found, str):
        return [Tile(title, "Not measured", "open", "No number says what came of it.") for title in titles.values()]
    heads = outcomes(found.data)
    return [Tile(titles[role], head, _TONES.get(head, "open"), _tile_line(found, role)) for role, head in heads.items()]


def _tile_line(found: Measurement, role: str) -> str:
    data = found.data[role]
    assert data.after is not None
    line = f"loss {number(data.before.loss)} before, {number(data.after.loss)} after"
    if data.answers:
        line += f"; {data.before.exact} of {data.answers} answers exact before, {data.after.exact} after"
    return line


def _files_line(verified: Verified) -> str:
    return {
        "good": "What lies on the disk is what the run has written.",
        "bad": f"{len(verified.problems)} wrong; see below." if verified.problems else "See below.",
    }.get(verified.tone, "Nobody has looked.")


def _numbers(found: Measurement) -> list[Sequence[str]]:
    """The rows of the table of numbers: a column for each data set."""
    both = [found.data[role] for role in ("forget", "retain")]
    rows: list[Sequence[str]] = [("rows measured", *(f"{data.rows:,} of {data.total:,}" for data in both))]
    for when, sides in (("before", [data.before for data in both]), ("after", [data.after for data in both])):
        losses = [None if side is None else side.loss for side in sides]
        rows.append((f"loss {when}", *map(number, losses)))
        rows.append((f"chance of each right piece, {when}", *map(chance, losses)))
        if any(data.answers for data in both):
            exact = [
                f"{side.exact} of {data.answers}" if side is not None and data.answers else "–"
                for side, data in zip(sides, both, strict=True)
            ]
            rows.append((f"answers exact {when}", *exact))
    return rows


def _asked(report: Report, run: Path) -> list[tuple[str, str]]:
    paths = {role: record["path"] for role, record in report.inputs.items()}
    model, result = paths.get("model", "not named"), str(run.absolute())
    if report.merged:
        adapter = paths.get("tuned", "not named")
        return [("Base", model), ("Adapter", adapter), ("Result", result), ("Method", _MERGED), ("Run", _times(report))]
    rule = "preconditioned" if report.preconditioned is not None else report.rule
    data = {role: f"{record['samples']:,} {_located(record)}" for role, record in report.data.items()}
    asked = [
        ("Model", model),
        ("Result", "the model itself, changed in place" if report.in_place else result),
        ("To be forgotten", data.get("forget", "no data was named")),
        ("To be kept", data.get("retain", "no data was named")),
        ("Method", f"{_WHAT.get(rule, _WHAT[''])} (rule {report.rule_words()})"),
        ("Strength", f"λ = {report.lam:.6g}; {_bound(report)}"),
        ("Run", _times(report)),
    ]
    scope = [
        f"{word} {', '.join(patterns)}" for word, patterns in (("only", report.only), ("not", report.leave)) if patterns
    ]
    return asked + ([("Parameters", "; ".join(scope))] if scope else [])


def _bound(report: Report) -> str:
    """How the strength was chosen, in a clause."""
    if report.setting_choice is not None:
        chosen = report.setting_choice
        return f"chosen of {len(chosen.tried)} settings{chosen.within()} (see below)"
    if report.choice is not None:
        return f"the largest of {len(report.choice.tried)} tried at which {report.choice.condition()} (see below)"
    return "given by whoever ran it"


def _times(report: Report) -> str:
    versions = f"perta_fast {report.versions.get('perta-fast') or 'of an unknown version'}"
    if not report.started or not report.finished:
        return versions
    text = f"{in_words(report.started)} to {in_words(report.finished)}{_duration(report.started, report.finished)}"
    times = "once" if report.resumed == 1 else f"{report.resumed} times"
    return f"{text}{f', stopped and resumed {times}' if report.resumed else ''}; {versions}"


def _duration(started: str, finished: str) -> str:
    try:
        seconds = round((datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds())
    except (TypeError, ValueError):  # a damaged report may hold any text
        return ""
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f" ({f'{hours} h ' if hours else ''}{f'{minutes} min ' if minutes else ''}{seconds % 60} s)"


def rest_of(answers: Answers | str | None) -> list[Shown]:
    """The answers that the head does not show, or does not show whole."""
    shown = answers.shown() if isinstance(answers, Answers) else []
    return [row for number, row in enumerate(shown) if number >= ASKED or _short(row) != row]


def has_more(answers: Answers | str | None) -> bool:
    """Whether there are more questions than the head shows."""
    return isinstance(answers, Answers) and len(answers.questions) > ASKED


def _short(row: Shown) -> Shown:
    """With long texts cut, as the head of the page has to fit on paper."""
    role, *texts = row
    question, truth, before, after = (text if len(text) <= _LONG else f"{text[:_LONG]} […]" for text in texts)
    return role, question, truth, before, after


def _no_answers(answers: Answers | str | None, merged: bool) -> str:
    if isinstance(answers, Answers):
        return ""
    if isinstance(answers, str):
        return f"Not shown: {answers}."
    if merged:
        return "Not shown, as no questions were given. This puts the answers to yours here:"
    return "Not shown, as questions and answers may be private. This puts three of them here:"


def _command(report: Report, run: Path) -> str:
    """What shows the answers; a merge has no data whose questions could be asked."""
    questions = ["--prompts", "questions.jsonl"] if report.merged else []
    return shell_command("perta", "report", run, "--show-text", *questions, "--out", "page.html")

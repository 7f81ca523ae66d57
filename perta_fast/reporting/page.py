"""The sections of a page, in their order: evidence in, HTML and plots out. Nothing is read or written here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from perta_fast.records.report import Report
from perta_fast.reporting import figures, html
from perta_fast.reporting.answers import Answers
from perta_fast.reporting.evidence import Curve, Scores, data_hashes
from perta_fast.reporting.figures import Plot
from perta_fast.reporting.tensor_places import element_count, place_of, weight_grids
from perta_fast.reporting.weight_distribution import Distribution
from perta_fast.sweeping.results import ScoredSetting

_OUTSIDE = 40  # tensors outside the layers that are listed

Draw = Callable[[Plot], str]


@dataclass(frozen=True)
class Evidence:
    """Everything that a page shows. weights: a text says why there is no distribution."""

    report: Report
    curves: Sequence[Curve]
    scores: Sequence[Scores]
    weights: Distribution | str
    answers: Answers | None


def compose(evidence: Evidence) -> tuple[bytes, list[Plot]]:
    """The page, and the plots that are in it."""
    report = evidence.report
    plots: list[Plot] = []

    def draw(plot: Plot) -> str:
        plots.append(plot)
        return html.figure(plot.caption, plot.png)

    sections = [
        _run(report),
        _trade_off(evidence, draw),
        _evaluations(evidence.scores),
        _weights(report, draw),
        _distribution(evidence.weights, draw),
        _changes(report, draw),
        _costs(report),
        _answers(evidence.answers),
        _provenance(evidence),
    ]
    return html.document(f"PerTA: rule {report.rule}, λ = {report.lam:g}", sections), plots


def _run(report: Report) -> str:
    settings: list[tuple[str, html.Cell]] = [
        ("rule", report.rule),
        ("λ", report.lam),
        ("p", report.p),
        ("α", report.alpha),
        ("threshold", "none" if report.threshold is None else report.threshold),
        ("started", report.started),
        ("finished", report.finished),
        ("in place", "yes" if report.in_place else "no"),
        ("taken up again", f"{report.resumed} times"),
        *((name.replace("_", " "), value) for name, value in report.settings.items()),
    ]
    return html.section(
        "run",
        "What was run",
        html.paragraph("θ_out = θ − λ · w ⊙ (θ_f − θ_0), w = I_f^p / (I_f^p + α · I_r^p)"),
        html.table("Settings", ("setting", "value"), [(name, _text(value)) for name, value in settings]),
        html.table("Tensors by what was done to them", ("action", "tensors"), list(report.counts.items())),
        *(html.paragraph(f"Warning: {warning}") for warning in report.warnings),
    )


def _trade_off(evidence: Evidence, draw: Draw) -> str:
    if not evidence.curves:
        return html.section("trade-off", "Trade-off", html.note("No sweep was given (--sweep)."))
    hashes = data_hashes(evidence.curves[0].sweep)
    points, notes = [], []
    for scores in evidence.scores:
        point = scores.point()
        if point is None:
            notes.append(f"{scores.label}: not drawn, as it has no forget_loss and retain_loss.")
        elif any(scores.hashes.get(role) != hashes.get(role) for role in ("forget", "retain")):
            notes.append(f"{scores.label}: not drawn, as it was evaluated on other data than the sweeps.")
        else:
            points.append((scores.label, point))
    golds = {curve.path: curve.sweep.gold for curve in evidence.curves}
    points += [("gold", (gold.retain_loss, gold.forget_loss)) for gold in golds.values() if gold is not None]
    run = {role: found["blake3"] for role, found in evidence.report.data.items()}
    if run and run != hashes:
        notes.append("The sweeps were scored on other data than this run was made with.")
    tables = [
        html.table(
            f"Sweep {curve.label}; losses are mean token cross-entropies in nats",
            ("λ", "forget loss", "retain loss", "parameters changed (%)", "seconds"),
            [_measured(row) for row in curve.rows],
        )
        for curve in evidence.curves
    ]
    plot = draw(figures.trade_off(evidence.curves, points))
    return html.section("trade-off", "Trade-off", plot, *map(html.note, notes), *tables)


def _evaluations(evaluations: Sequence[Scores]) -> str:
    if not evaluations:
        return html.section("evaluation", "Evaluation", html.note("No evaluation was given (--eval)."))
    names = dict.fromkeys(name for scores in evaluations for name in scores.values)
    rows = [(name, *(scores.values.get(name) for scores in evaluations)) for name in names]
    caption = "Metrics by open-unlearning's names; a dash where a file has no finite number"
    labels = [scores.label for scores in evaluations]
    return html.section("evaluation", "Evaluation", html.table(caption, ("metric", *labels), rows))


def _weights(report: Report, draw: Draw) -> str:
    grids = weight_grids(report.tensors)
    drawn, rest = grids[: figures.STACKS], grids[figures.STACKS :]
    parts = [draw(figures.weight_maps(drawn)) if drawn else html.note("No tensor within a layer has a w.")]
    if rest:
        parts.append(html.note(f"{len(rest)} more stacks of layers are left out."))
    parts += [
        html.note(f"{grid.stack}: the {grid.left_out} smallest kinds of module are left out.")
        for grid in drawn
        if grid.left_out
    ]
    outside = [row for row in report.tensors if place_of(row.name) is None]
    if outside:
        parts.append(
            html.table(
                "Tensors outside the layers",
                ("tensor", "elements", "mean w", "action"),
                [
                    (row.name, element_count(row.shape), row.mean_weight, row.action)
                    for row in outside[:_OUTSIDE]
                ],
            )
        )
    if len(outside) > _OUTSIDE:
        parts.append(html.note(f"{len(outside) - _OUTSIDE} more are in perta_report.json."))
    return html.section("weights", "w by layer and kind of module", *parts)


def _distribution(found: Distribution | str, draw: Draw) -> str:
    title = "How w is distributed"
    if isinstance(found, str):
        return html.section("distribution", title, html.note(f"Not shown: {found}."))
    share = 100 * found.above_half / max(found.total, 1)
    return html.section(
        "distribution",
        title,
        html.paragraph(f"w > 1/2 at {found.above_half:,} of {found.total:,} parameters ({share:.2f} %)."),
        draw(figures.weight_histogram(found)),
    )


def _changes(report: Report, draw: Draw) -> str:
    plot = figures.relative_changes(report.tensors)
    total = sum(element_count(row.shape) for row in report.tensors)
    changed = sum(row.changed for row in report.tensors)
    return html.section(
        "change",
        "Relative change by layer",
        html.paragraph(f"{changed:,} of {total:,} stored values differ from the model's."),
        html.note("No tensor within a layer has changed.") if plot is None else draw(plot),
    )


def _costs(report: Report) -> str:
    phases = [
        (name, phase["seconds"], phase["bytes"] / 1e9, phase["gb_per_s"] if phase["bytes"] else None)
        for name, phase in report.phases.items()
    ]
    parts = [html.table("Time by phase", ("phase", "seconds", "GB moved", "GB/s"), phases)]
    if report.overlap:
        overlap = [(name.replace("_", " "), value) for name, value in report.overlap.items()]
        caption = "Of a streamed run; hidden is what went by while it computed"
        parts.append(html.table(caption, ("overlap", "seconds"), overlap))
    memory = [
        (name.removesuffix("_bytes").replace("_", " "), value / 2**20) for name, value in report.memory.items()
    ]
    parts.append(html.table("Memory", ("what", "MiB"), memory))
    return html.section("costs", "Time and memory", *parts)


def _answers(answers: Answers | None) -> str:
    title = "Answers before and after"
    if answers is None:
        return html.section("answers", title, html.note("Not shown (--prompts with --show-text)."))
    before = answers.before or [f"(not asked: {answers.why})"] * len(answers.after)
    parts = []
    for question, truth, *both in zip(answers.questions, answers.truth, before, answers.after, strict=True):
        parts += [html.heading(question), html.note(f"The data's answer: {truth}")]
        parts.append(html.side_by_side(("before", both[0]), ("after", both[1])))
    return html.section("answers", title, *parts)


def _provenance(evidence: Evidence) -> str:
    report = evidence.report
    directories = {**report.inputs, "output": report.output}
    files = [
        (role, name, file["bytes"], file["blake3"])
        for role, record in directories.items()
        for name, file in record["files"].items()
    ]
    data = [
        (role, found["path"], found["samples"], found["truncated"], found["blake3"])
        for role, found in report.data.items()
    ]
    read = [("sweep", curve.label, str(curve.path)) for curve in evidence.curves]
    read += [
        ("evaluation", scores.label, f"{scores.path}{scores.model and f' of {scores.model}'}")
        for scores in evidence.scores
    ]
    importances = [
        (role, name, value) for role, found in report.importance.items() for name, value in found.items()
    ]
    versions = [*report.versions.items(), ("threads", str(report.threads))]
    versions.append(("instruction set", report.instruction_set))
    return html.section(
        "provenance",
        "What it rests on",
        html.table(
            "Directories", ("what", "path"), [(role, found["path"]) for role, found in directories.items()]
        ),
        html.table("Files", ("of", "file", "bytes", "BLAKE3"), files),
        html.table("Data", ("set", "path", "samples", "cut", "BLAKE3"), data) if data else "",
        html.table("Importances", ("of", "setting", "value"), importances) if importances else "",
        html.table("Read for this page", ("what", "name", "file"), read) if read else "",
        html.table("Software", ("what", "version"), versions),
    )


def _measured(row: ScoredSetting) -> Sequence[html.Cell]:
    """Dashes for a strength that was skipped."""
    found = (row.forget_loss, row.retain_loss, 100 * row.changed, row.seconds)
    return row.lam, *((None,) * len(found) if row.skipped else found)


def _text(value: html.Cell) -> str:
    return f"{value:.6g}" if isinstance(value, float) and isfinite(value) else str(value)

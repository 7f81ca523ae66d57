"""The content of the page: tables, notes and plots for the template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from perta_fast.records.report import Report, data_place
from perta_fast.reporting import figures
from perta_fast.reporting.answers import Answers
from perta_fast.reporting.choice import choice_of
from perta_fast.reporting.evidence import Curve, Scores, data_hashes
from perta_fast.reporting.figures import Plot
from perta_fast.reporting.html import Cell, templates
from perta_fast.reporting.tensor_positions import element_count, position_of, weight_grids
from perta_fast.reporting.verdict import has_more, rest_of, title, verdict
from perta_fast.reporting.verified import Verified
from perta_fast.reporting.weight_distribution import Distribution
from perta_fast.scoring.setting import ScoredSetting

_OUTSIDE = 40  # tensors outside the layers that are listed


@dataclass(frozen=True)
class Evidence:
    """Everything that a page shows.

    run: where the result lies. weights: the distribution of w, or why it is not known. answers: None if nobody asked
    for them, a text if there is a reason why there are none.
    """

    report: Report
    run: Path
    verified: Verified
    curves: Sequence[Curve]
    scores: Sequence[Scores]
    weights: Distribution | str
    answers: Answers | str | None


def compose(evidence: Evidence) -> tuple[bytes, list[Plot]]:
    """The page in UTF-8, and its plots."""
    report = evidence.report
    choice = choice_of(report)
    trade_off = _trade_off(evidence) if evidence.curves else None
    weights = _weights(report)
    histogram = None if isinstance(evidence.weights, str) else figures.weight_histogram(evidence.weights)
    changes = figures.relative_changes(report.tensors)
    page = templates().get_template("page.html")
    text = page.render(
        title=title(report),
        report=report,
        verdict=verdict(report, evidence.run, evidence.verified, evidence.answers),
        settings=_settings(report),
        choice=choice,
        trade_off=trade_off,
        scores=evidence.scores,
        metrics=_by_name([scores.values for scores in evidence.scores]),
        stress=_by_name([scores.stress for scores in evidence.scores]),
        weights=weights,
        histogram=histogram,
        distribution=_distribution(evidence.weights),
        changes=changes,
        changed=sum(row.changed for row in report.tensors),
        elements=sum(element_count(row.shape) for row in report.tensors),
        **_costs(report),
        answers=rest_of(evidence.answers),
        more_answers=has_more(evidence.answers),
        provenance=_provenance(evidence),
    )
    plots = [
        choice and choice.plot,
        trade_off and trade_off["plot"],
        None if report.merged else weights["plot"],
        histogram,
        changes,
    ]
    return text.encode(), [plot for plot in plots if plot]


def _settings(report: Report) -> list[tuple[str, str]]:
    settings: dict[str, Any] = {
        **({} if report.merged else _rule_settings(report)),
        **{name: patterns for name, patterns in (("only", report.only), ("leave", report.leave)) if patterns},
        "started": report.started,
        "finished": report.finished,
        "in place": report.in_place,
        "resumed": f"{report.resumed} times",
    }
    settings |= {name.replace("_", " "): value for name, value in report.settings.items()}
    return [(name, _in_words(value)) for name, value in settings.items()]


def _rule_settings(report: Report) -> dict[str, Any]:
    return {
        "rule": report.rule_words(),
        "λ": f"{report.lam:.10g}",
        "θ_f": "as it was given" if report.preconditioned is None else report.preconditioned.line(),
        **({} if report.removal is None else {"retain importance": report.removal.line().partition(": ")[2]}),
        "choice of λ": _chosen(report),
        "p": report.p,
        "α": report.alpha,
        "threshold": report.threshold,
    }


def _chosen(report: Report) -> str:
    """How λ was chosen."""
    if report.setting_choice is not None:
        return report.setting_choice.lines()[0]
    return "given" if report.choice is None else "; ".join(report.choice.lines())


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) and isfinite(value) else str(value)


def _trade_off(evidence: Evidence) -> dict[str, Any]:
    """The plot, notes on what it leaves out, and the rows of each curve."""
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
    run = {role: data["blake3"] for role, data in evidence.report.data.items() if role in hashes}
    if run and run != hashes:
        notes.append("The sweeps were scored on other data than this run used.")
    return {
        "plot": figures.trade_off(evidence.curves, points),
        "notes": notes,
        "curves": [(curve.label, [_measured(row) for row in curve.rows]) for curve in evidence.curves],
    }


def _measured(row: ScoredSetting) -> Sequence[Cell]:
    numbers = (row.forget_loss, row.retain_loss, 100 * row.changed, row.seconds)
    return row.lam, *((None,) * len(numbers) if row.skipped else numbers)


def _by_name(evaluations: Sequence[Mapping[str, Cell]]) -> list[Sequence[Cell]]:
    """A row for each name, a column for each evaluation."""
    names = dict.fromkeys(name for values in evaluations for name in values)
    return [(name, *(values.get(name) for values in evaluations)) for name in names]


def _weights(report: Report) -> dict[str, Any]:
    """The heat maps, notes on what they leave out, and the tensors outside the layers."""
    grids = weight_grids(report.tensors)
    drawn, rest = grids[: figures.STACKS], grids[figures.STACKS :]
    notes = [f"{len(rest)} more stacks of layers are left out."] if rest else []
    notes += [
        f"{grid.stack}: the {grid.left_out} smallest kinds of module are left out." for grid in drawn if grid.left_out
    ]
    outside = [row for row in report.tensors if position_of(row.name) is None]
    return {
        "plot": figures.weight_maps(drawn) if drawn else None,
        "notes": notes,
        "outside": [(row.name, element_count(row.shape), row.mean_weight, row.action) for row in outside[:_OUTSIDE]],
        "more": [f"{more} more are in perta_report.json."] if (more := len(outside[_OUTSIDE:])) else [],
    }


def _distribution(weights: Distribution | str) -> str:
    if isinstance(weights, str):
        return f"Not shown: {weights}."
    share = 100 * weights.above_half / max(weights.total, 1)
    return f"w > 1/2 at {weights.above_half:,} of {weights.total:,} parameters ({share:.2f} %)."


def _costs(report: Report) -> dict[str, list[Sequence[Cell]]]:
    return {
        "phases": [
            (name, phase["seconds"], phase["bytes"] / 1e9, phase["gb_per_s"] if phase["bytes"] else None)
            for name, phase in report.phases.items()
        ],
        "overlap": [(name.replace("_", " "), seconds) for name, seconds in report.overlap.items()],
        "memory": [
            (name.removesuffix("_bytes").replace("_", " "), count / 2**20) for name, count in report.memory.items()
        ],
    }


def _provenance(evidence: Evidence) -> list[tuple[str, Sequence[str], list[Sequence[Cell]]]]:
    """Tables, each with its caption and columns."""
    report = evidence.report
    directories = {**report.inputs, "output": report.output}
    read = [("sweep", curve.label, str(curve.path)) for curve in evidence.curves]
    read += [
        ("evaluation", scores.label, f"{scores.path}{scores.model and f' of {scores.model}'}")
        for scores in evidence.scores
    ]
    versions = report.versions | {"threads": str(report.threads), "instruction set": report.instruction_set}
    return [
        ("Directories", ("what", "path"), [(role, record["path"]) for role, record in directories.items()]),
        (
            "Files",
            ("of", "file", "bytes", "BLAKE3"),
            [
                (role, name, file["bytes"], file["blake3"])
                for role, record in directories.items()
                for name, file in record["files"].items()
            ],
        ),
        (
            "Data",
            ("set", "path", "samples", "cut", "BLAKE3"),
            [
                (role, data_place(data), data["samples"], data["truncated"], data["blake3"])
                for role, data in report.data.items()
            ],
        ),
        (
            "Importances",
            ("of", "setting", "value"),
            [
                (role, name, _in_words(value))
                for role, record in report.importance.items()
                for name, value in record.items()
            ],
        ),
        ("Read for this page", ("what", "name", "file"), list(read)),
        ("Software", ("what", "version"), list(versions.items())),
    ]

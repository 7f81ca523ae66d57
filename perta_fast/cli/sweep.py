"""``perta sweep``."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.cli import options
from perta_fast.cli.command import Command, Option, Outcome, flag
from perta_fast.cli.importing import importing
from perta_fast.cli.options import JSON, check_streamed, forecast_shown, keywords, name_list, number_list
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import printable, shell_command
from perta_fast.rules import PRECONDITIONED, Rule
from perta_fast.scoring.criteria import LOSS, METRICS, SELECTIONS

if TYPE_CHECKING:
    from perta_fast.scoring.setting import ScoredSetting
    from perta_fast.sweeping.results import Sweep


def run(parsed: argparse.Namespace) -> int | Outcome:
    with importing():
        from perta_fast.sweeping.dry_run import preview_sweep
        from perta_fast.sweeping.run import sweep

    check_streamed(parsed)
    settings = settings_of(parsed)
    if parsed.dry_run:
        ranks = Ranks.of(parsed.group)
        with ranks.together("the estimate"):
            if ranks.first:
                return forecast_shown(preview_sweep(settings, options.conditions(parsed), ranks.world))
        return 0
    result = sweep(**settings, group=parsed.group)
    if not Ranks.of(parsed.group).first:
        return 0
    return Outcome("\n".join([result.summary(), *_next_steps(parsed, result)]), result.as_record())


def _next_steps(parsed: argparse.Namespace, result: "Sweep") -> list[str]:
    """For a person: where the choice and the figures are, or the command that makes them a checkpoint."""
    lines = []
    best, curves = result.best, result.curves()
    if parsed.checkpoint is not None:
        lines.append(printable(f"chosen checkpoint written to {parsed.checkpoint}"))
    elif parsed.in_place:
        lines.append(printable(f"what was chosen is in {parsed.model} now"))
    elif best is not None and best.rule:
        lines.append(f"Write it with:\n{_making(parsed, result, best, repr(best.lam))}")
    elif best is None and len(curves) == 1:
        (rows,) = curves.values()
        lines.append(f"Write the one you choose, L, with:\n{_making(parsed, result, rows[0], 'L')}")
    if parsed.out is not None:
        lines.append(printable(f"written to {parsed.out}"))
    return lines


def settings_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the Python function ``sweep``."""
    settings = keywords(parsed, without=("dry_run",))
    for one, several in (("rule", "rules"), ("mu", "mus"), ("p", "ps"), ("alpha", "alphas")):
        settings[one] = settings.pop(several) or settings[one]
    return settings


def _making(parsed: argparse.Namespace, result: "Sweep", row: "ScoredSetting", lam: str) -> str:
    """The command that writes the checkpoint of the setting ``row`` of a sweep at ``lam``."""
    rule = Rule.of_unlearn(row.rule, 0.0)
    settings: dict[str, Any] = {name: getattr(parsed, name) for name in ("model", "base", "tuned")}
    settings |= {"rule": row.rule, "mu": row.mu}
    if rule.estimator is not None:
        settings |= {"p": row.p, "alpha": row.alpha, "threshold": parsed.threshold}
    importances = _importances(parsed, rule)
    if row.mu is not None and parsed.save_tuned is not None:
        from perta_fast.sweeping.vectors import Vectors

        several = len({other.mu for other in result.rows if other.mu is not None}) > 1
        settings |= {"rule": "tv", "mu": None, "tuned": parsed.save_tuned / (Vectors.name(row.mu) if several else "")}
    reads_data = settings["rule"] == PRECONDITIONED or (rule.estimator is not None and not importances)
    if reads_data:
        from perta_fast.data.forms import fields_text

        names = ("forget", "retain", "at", "batch_size", "max_length", "device", "dtype")
        settings |= {name: getattr(parsed, name) for name in names}
        settings["fields"] = None if parsed.fields is None else fields_text(parsed.fields)
    words = [
        word
        for name, value in (settings | importances).items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", value if isinstance(value, Path) else str(value))
    ]
    if reads_data:
        told = (("--system-prompt", parsed.system_prompt), ("--date-string", result.settings["date"]))
        words += [f"{option}={text}" for option, text in told if text is not None]
    for option in options.SCOPE:
        patterns = getattr(parsed, option.name)
        words += [f"--{option.key}", ",".join(patterns)] if patterns else []
    words += ["--common-rows"] if parsed.common_rows else []
    words += ["--stream"] if parsed.stream and reads_data else []
    strength = [f"--lam={lam}"] if lam.startswith("-") else ["--lam", lam]  # -1e-05 alone is taken for an option
    return shell_command("perta", "unlearn" if reads_data else "apply", *words, *strength, "--out", "DIR")


def _importances(parsed: argparse.Namespace, rule: Rule) -> dict[str, Path]:
    """The importances that were given for ``rule``, or were kept."""
    from perta_fast.subtraction.inputs import estimators_of
    from perta_fast.sweeping.keeping import is_of_several

    pairs = zip(parsed.forget_importance, parsed.retain_importance, strict=True)
    for forget, retain in pairs:
        if rule.estimator in estimators_of(forget, retain, None):
            return {"forget_importance": forget, "retain_importance": retain}
    for both in parsed.importance:
        if rule.estimator in estimators_of(None, None, both):
            return {"importance": both}
    if rule.estimator is None or parsed.save_importance is None:
        return {}
    kept: Path = parsed.save_importance
    return {"importance": kept / rule.estimator if is_of_several(kept) else kept}


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of percent") from error


COMMAND = Command(
    "sweep",
    "score many settings without writing them, and choose one",
    (
        *options.CHECKPOINTS,
        Option("forget", "data to forget", Path, "FILE", required=True, named=True),
        Option("retain", "data to keep", Path, "FILE", required=True, named=True),
        options.FIELDS,
        options.SHOW_LABELS,
        replace(options.ANY_RULE, one_of="rules"),
        Option("rules", "several rules", name_list, "R,R,...", one_of="rules"),
        Option("lams", "strengths; without them, the largest within the bound", number_list, "L,L,..."),
        replace(options.MU, one_of="mus"),
        Option("mus", "several of these", number_list, "X,X,...", one_of="mus"),
        replace(options.ALPHA, one_of="alphas"),
        Option("alphas", "several weights", number_list, "A,A,...", one_of="alphas"),
        replace(options.P, one_of="ps"),
        Option("ps", "several exponents", number_list, "P,P,...", one_of="ps"),
        options.THRESHOLD,
        *options.SCOPE,
        Option("target_retain_loss", "bound: a retain loss of at most X nats", float, "X", one_of="bound"),
        Option(
            "max_retain_rise",
            "bound: a retain loss of at most X nats above the model's own",
            float,
            "X",
            one_of="bound",
        ),
        Option(
            "max_retain_increase",
            "bound: a retain loss of at most P percent above the model's own",
            _percent,
            "P",
            one_of="bound",
        ),
        Option("retain_floor", "bound: a retain metric of at least X (not for loss)", float, "X", one_of="bound"),
        flag("up_to_base", "bound, beside one of these: a forget loss of at most that of the base"),
        Option("metric", "what is chosen by, as perta eval names it (loss)", default=LOSS, choices=METRICS),
        Option(
            "select",
            "choose what has forgotten most within the bound, or what is closest to the gold model",
            choices=SELECTIONS,
        ),
        Option("also", "further data to score", Path, "FILE", [], several=True, named=True),
        Option("holdout", "data never trained on; streamed, for membership scores", Path, "FILE", named=True),
        Option("gold", "a model trained without the forget data", Path, "DIR", named=True),
        Option("checkpoint", "directory to make, of what was chosen", Path, "DIR", one_of="result", makes=True),
        flag("in_place", "change the model where it lies into what was chosen", one_of="result"),
        flag("leave_others", "change in place though other weight files lie beside the shards"),
        flag("check", "measure what was forgotten and kept by what was chosen, on a few rows (off)"),
        Option("forget_importance", "instead of estimating it; one an estimator", Path, "DIR", [], several=True),
        Option("retain_importance", "the same", Path, "DIR", [], several=True),
        Option("importance", "in place of the two: what --save-importance wrote", Path, "DIR", [], several=True),
        *options.KEPT,
        options.AT_BY_RULE,
        replace(options.STREAM[0], help="hold one decoder layer in memory at a time; no answers"),
        *options.LIMITS,
        options.DRY_RUN,
        Option("threads", "threads to subtract with (all processors)", int, "N"),
        *options.CHAT,
        *options.ESTIMATION,
        Option("out", "directory to make, for figures and plot", Path, "DIR", makes=True),
        flag("overwrite", "replace what is there, and start a stopped sweep over"),
        flag("quiet", "no progress bar, no table"),
        JSON,
    ),
    run,
    over_ranks=True,
)

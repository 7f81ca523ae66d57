"""``perta unlearn``."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast import compiled
from perta_fast.cli import choosing, options
from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.cli.options import check_streamed, forecast_shown, keywords
from perta_fast.cli.recipe_options import RECIPE
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.rules import (
    DEFAULT_RETAIN_RISE,
    PRECONDITIONED,
    Rule,
    check_strength,
    check_takes_importances,
    resolved_at,
)

if TYPE_CHECKING:
    from perta_fast.streaming.forecast.forecast import Forecast


def run(parsed: argparse.Namespace) -> int | Outcome:
    check_streamed(parsed)
    choosing.check_choice(parsed)
    if parsed.dry_run:
        ranks = Ranks.of(parsed.group)
        with ranks.together("the estimate"):
            if ranks.first:
                return forecast_shown(_preview(parsed, ranks.world))
        return 0
    if parsed.recipe is not None:
        _check_recipe_stays(parsed)
    if parsed.choose is not None:
        return choosing.choose(parsed)
    with importing():
        from perta_fast.runs.unlearn import unlearn

    report = unlearn(**arguments_of(parsed), group=parsed.group)
    return made(report.as_record(), report.summary(), parsed.out or parsed.model)


def arguments_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Those of the Python function ``unlearn``, for a run with one setting."""
    return keywords(parsed, ("recipe", "dry_run", *(option.name for option in choosing.OPTIONS)))


def _check_recipe_stays(parsed: argparse.Namespace) -> None:
    """Raise InputError if an output would replace the recipe, of which ``unlearn`` does not know."""
    from perta_fast.files.new_directory import check_output

    for place in (parsed.out, parsed.save_importance, parsed.save_tuned):
        if place is not None:
            check_output(place, overwrite=True, inputs=[parsed.recipe])


def _preview(parsed: argparse.Namespace, ranks: int) -> "Forecast":
    if parsed.choose is not None:
        return choosing.preview(parsed, ranks)
    from perta_fast.checkpoints.adapters import is_adapter
    from perta_fast.files.hub import local_model
    from perta_fast.importance.kept_form import KeptForm
    from perta_fast.importance.store import WIDTH
    from perta_fast.streaming.forecast.dry_run import preview
    from perta_fast.subtraction.scope import Scope

    check_strength(parsed.lam, parsed.max_retain_rise, parsed.stream, parsed.allow_zero)
    estimator = Rule.of_unlearn(parsed.rule, parsed.lam, parsed.p, parsed.alpha, parsed.threshold).estimator
    preconditions = parsed.rule == PRECONDITIONED
    if estimator is None and not preconditions:
        raise InputError(f"--dry-run has nothing to estimate for rule {parsed.rule}, which reads the weights alone")
    whole: Path | None = parsed.whole_importance
    if whole is not None:
        check_takes_importances(parsed.rule, "whole_importance")
    roles = ("retain",) if preconditions else ("forget", "retain") if whole is None else ("forget",)
    data = {role: getattr(parsed, role) for role in roles}
    if None in data.values():
        raise InputError(f"--dry-run needs the data that rule {parsed.rule} reads: {' and '.join(data)}")
    Scope.of(parsed.only, parsed.leave).check(local_model(parsed.model, parsed.download))
    KeptForm.check_is_asked_for(parsed.save_as, parsed.importance_dtype, parsed.save_importance is not None)
    form = KeptForm.of(parsed.save_as, parsed.importance_dtype)
    in_one_walk, place = whole is None and not parsed.in_place, parsed.out or parsed.model
    forecast_of = partial(
        preview,
        parsed.model if resolved_at(parsed.rule, parsed.at) == "model" else parsed.base,
        estimator=estimator,
        destination=place,
        conditions=options.conditions(parsed),
        subtract=in_one_walk,
        low_rank=preconditions and is_adapter(local_model(parsed.tuned, parsed.download)),
        threads=parsed.threads or compiled.kernels().available_threads(),
        ranks=ranks,
    )
    if preconditions or in_one_walk:
        kept_at = parsed.save_importance
        forecast = forecast_of(data, kept=0 if kept_at is None else form.width, kept_at=kept_at)
    else:  # to files, one after the other; from a pair that is not kept, a ratio is made
        pair = form.as_ratio or parsed.save_importance is None
        to_files = partial(forecast_of, kept=WIDTH, destination=place if pair else parsed.save_importance)
        parts = [(f"the {role} importance:", to_files({role: data[role]})) for role in roles]
        from perta_fast.streaming.forecast.forecast import Forecast  # only now: bad input is refused without torch

        forecast = Forecast.joined(parts)
    return forecast if in_one_walk else forecast.followed_by(f"\n{_after_the_walk(whole, parsed.in_place)}")


def _after_the_walk(whole: Path | None, in_place: bool) -> str:
    from perta_fast.checkpoints.checkpoint import Checkpoint
    from perta_fast.importance.store import STEM
    from perta_fast.memory import format_size

    computed = "the result is computed from files, chunk by chunk, as by perta apply"
    computed += " --in-place, through a journal of at most 192 MiB" if in_place else ""
    if whole is None:
        return f"then {computed}"
    size = format_size(4 * sum(entry.count for entry in Checkpoint.open(whole, STEM).tensors.values()))
    return f"then the retain importance ({size} more on the disk) is what remains of the whole, and {computed}"


COMMAND = Command(
    "unlearn",
    "make a model forget: look at both data sets, then subtract",
    (
        RECIPE,
        *options.CHECKPOINTS,
        Option(
            "forget", "data to forget; needed without --lam, and by rules with importances", Path, "FILE", named=True
        ),
        Option("retain", "data to keep; needed without --lam, and by all rules but tv", Path, "FILE", named=True),
        options.FIELDS,
        options.SHOW_LABELS,
        options.AT_BY_RULE,
        Option(
            "whole_importance",
            "importance of all rows: estimate only that of --forget, which must be among them, and retain the rest",
            Path,
            "DIR",
        ),
        *options.KEPT,
        Option(
            "check",
            "measure what was forgotten and kept, on a few rows (on; not with --stream)",
            bool,
            default=True,
            negatable=True,
        ),
        replace(options.STREAM[0], help=f"{options.STREAM[0].help}; needs --lam or --choose"),
        *options.STREAM[1:],
        replace(options.ANY_RULE, one_of="rules"),
        replace(
            options.LAM,
            help="strength lambda; without it, the largest at which the forget loss is at most that of the base, and "
            f"the retain loss rises by at most {DEFAULT_RETAIN_RISE:g} nats",
            default=None,
            one_of="strength",
        ),
        Option(
            "max_retain_rise",
            "take the largest lambda at which the retain loss rises by at most X nats, whatever is forgotten",
            float,
            "X",
            one_of="strength",
        ),
        replace(options.MU, one_of="mus"),
        options.P,
        replace(options.ALPHA, one_of="alphas"),
        options.THRESHOLD,
        *choosing.OPTIONS,
        *options.SCOPE,
        *options.CHAT,
        *options.ESTIMATION,
        *options.RESULT,
    ),
    run,
    over_ranks=True,
)

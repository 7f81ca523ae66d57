"""``perta recipe run``: the sections of a recipe, one after the other; what is done already is left as it is."""

import gc
from dataclasses import replace
from pathlib import Path

from perta_fast.cli import resume, sweep, unlearn
from perta_fast.cli.command import Outcome
from perta_fast.cli.parser import parser_of
from perta_fast.cli.recipe_plan import Plan, Way, plan
from perta_fast.cli.recipe_results import differs_in, is_half_made, is_there, state_of
from perta_fast.cli.recipe_section import Section
from perta_fast.cli.recipe_sections import check_inputs, sections_of
from perta_fast.errors import InputError, PertaError, printable
from perta_fast.files.new_directory import SWEEP_STATE, has_record
from perta_fast.records.recipe import read_recipe
from perta_fast.records.recipe_record import Made, RecipeRecord, state_of_result
from perta_fast.resuming import is_unfinished


def run_sections(path: Path, *, overwrite: bool, quiet: bool) -> int:
    """Run the recipe ``path``; return the exit status. Everything is checked before the first section begins."""
    sections = sections_of(read_recipe(path), path)
    record = RecipeRecord(path)
    check_inputs(sections)
    plans = plan(sections, record.made, overwrite=overwrite)
    for number, (section, planned) in enumerate(zip(sections, plans, strict=True), 1):
        if not quiet:
            text = f"step {number} of {len(sections)}, {section.name}: {section.result} {planned.way.value}"
            print(printable(text), flush=True)
        if planned.way is not Way.NOT_AT_ALL:
            _do(section, planned, record, overwrite or section.overwrites, quiet)
        if record.made[section.name].result is None:
            record.keep(section.name, replace(record.made[section.name], result=state_of_result(section.result)))
    return 0


def _do(section: Section, planned: Plan, record: RecipeRecord, overwrite: bool, quiet: bool) -> None:
    """Run one section. Raises its error, which names the section too.

    overwrite: other files may be replaced, and what was begun is made again if it cannot go on.
    """
    before = planned.known.before if planned.way is Way.FURTHER and planned.known else state_of(section)
    record.keep(section.name, Made(section.told(), planned.inputs(), before))
    try:
        outcome = _outcome(section, planned.way, overwrite, quiet)
    except InputError:
        half_changed = section.in_place and is_half_made(section)
        if planned.way is not Way.FURTHER or half_changed or not overwrite:
            raise
        outcome = _outcome(section, Way.OVER, overwrite, quiet)
    if planned.way is Way.FURTHER and (other := differs_in(section)) is not None:
        raise InputError(
            f"{section.where}: {section.result}: was begun by another command with another value of {other}"
        )
    if outcome is not None:
        print(outcome.text)
    gc.collect()  # the next section needs the memory


def _outcome(section: Section, way: Way, overwrite: bool, quiet: bool) -> Outcome | None:
    """Run the command of a section, or ``perta resume``; None if there is nothing to print."""
    more = ["--quiet"] if quiet else []
    more += ["--overwrite"] if way is Way.OVER or (way is Way.ANEW and overwrite) else []
    parsed = section.parsed(*more)
    if way is Way.FURTHER and _is_resumed(section):
        more = ["--quiet"] if parsed.quiet else []
        parsed = parser_of(resume.COMMAND).parse_args([*more, "--", str(section.result)])
        parsed.command, parsed.group = resume.COMMAND, None
    try:
        outcome = parsed.command.run(parsed)
    except PertaError as error:
        raise type(error)(f"{section.where}: {error}") from error
    return outcome if isinstance(outcome, Outcome) and not parsed.quiet else None


def _is_resumed(section: Section) -> bool:
    """Whether a stopped run goes on with ``perta resume`` alone, and not with the same command."""
    if section.command is sweep.COMMAND and has_record(section.result, SWEEP_STATE):
        return False  # with a model to change in place, perta resume would not
    by_itself = section.command is not unlearn.COMMAND or section.chooses
    return is_unfinished(section.result) and (not by_itself or is_there(section))

"""``perta recipe``: templates of recipes, a check of one, and the run of all its sections."""

import argparse
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.cli import unlearn
from perta_fast.cli.command import Command, Option, Outcome, flag
from perta_fast.cli.options import JSON
from perta_fast.cli.recipe_options import MAKE_NOTHING, alternatives, options_of, required
from perta_fast.errors import printable

if TYPE_CHECKING:
    from perta_fast.records.recipe import Setting

_HEAD = """\
# A run of perta unlearn. Check this file with: perta recipe check FILE
# and run it with: perta unlearn --recipe FILE
# Options on the command line win over those in here. Relative paths begin at this file's directory.
"""
_JOB_HEAD = """\
# A whole job: its sections are run in this order. Check this file with: perta recipe check FILE
# and run it with: perta recipe run FILE
# The keys of a section are the options of the command of its name. What stands above the sections is for all that know
# it. What one section makes, a later one reads under the same path. A section may be left out. Relative paths begin at
# this file's directory.
"""
# The values of a job, by section, beside those that the user fills in.
_JOB: dict[str, dict[str, str]] = {
    "": {"model": "", "base": "", "forget": "", "retain": "", "tuned": "tuned"},
    "tune": {"out": "tuned"},
    "sweep": {"max-retain-rise": "0.05", "out": "settings"},
    "unlearn": {"out": "unlearned"},
    "eval": {"model": "unlearned", "out": "scores.json"},
    "report": {"run": "unlearned", "sweep": "settings", "eval": "scores.json", "out": "page.html"},
}
_DATA = ("forget", "retain")  # which a run with the defaults needs too
_WIDTH = 100


def write_template(parsed: argparse.Namespace) -> int:
    text = job_template() if parsed.job else template(unlearn.COMMAND)
    if parsed.out is None:
        print(text, end="")
        return 0
    from perta_fast.files.new_file import check_output_file, write_output_file

    check_output_file(parsed.out, (".yaml", ".yml"), overwrite=parsed.overwrite)
    write_output_file(parsed.out, text.encode(), overwrite=parsed.overwrite)
    return 0


def check_recipe(parsed: argparse.Namespace) -> Outcome:
    from perta_fast.cli.recipe_sections import check_inputs, sections_of
    from perta_fast.records.recipe import read_recipe

    path = parsed.recipe
    recipe = read_recipe(path)
    sections = sections_of(recipe, path)
    what = f"a whole run, {len(recipe.settings)} settings"
    if recipe.sections:
        check_inputs(sections)
        what = f"a whole job: {', '.join(section.name for section in sections)}"
    record: dict[str, Any] = {"recipe": str(path), "settings": _values(recipe.settings)}
    if recipe.sections:
        record["sections"] = {name: _values(settings) for name, settings in recipe.sections.items()}
    return Outcome(printable(f"{path}: {what}"), record)


def _values(settings: Mapping[str, "Setting"]) -> dict[str, Any]:
    return {key: setting.value for key, setting in settings.items()}


def run_recipe(parsed: argparse.Namespace) -> int:
    from perta_fast.cli.recipe_run import run_sections

    return run_sections(parsed.recipe, overwrite=parsed.overwrite, quiet=parsed.quiet)


def template(command: Command) -> str:
    """A recipe with every option of ``command`` and its help; the user fills in those that are required."""
    return "\n".join([_HEAD, "\n\n".join(_entries(command, _first(command))), ""])


def job_template() -> str:
    """A recipe of a whole job, which runs once the user has filled in what is required."""
    from perta_fast.cli.recipe_sections import COMMANDS

    options = options_of(COMMANDS["sweep"])
    entries = [_entry(options[key], value, shown=True) for key, value in _JOB[""].items()]
    sections = [_section(COMMANDS[name], values) for name, values in _JOB.items() if name]
    return "\n".join([_JOB_HEAD, "\n\n".join(entries + sections), ""])


def _section(command: Command, values: Mapping[str, str]) -> str:
    """A section with ``values``, and the names of the other options in a comment."""
    lines = [f"  {key}: {value}" for key, value in values.items()]
    others = [key for key in options_of(command) if key not in (*values, *_JOB[""], *MAKE_NOTHING)]
    text = f"also (perta {command.name} --help): {', '.join(others)}"
    more = textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
    return "\n".join([f"# {command.help}", f"{command.name}:", *lines, *(f"  # {line}" for line in more)])


def _first(command: Command) -> list[str]:
    return [*(keys[0] for keys in required(command)), *_DATA]


def _entries(command: Command, first: Collection[str]) -> list[str]:
    """The options of ``command`` in YAML; all but the ``first`` are comments."""
    options = options_of(command)
    instead = {key: keys[0] for keys in alternatives(command) for key in keys[1:]}
    return [_entry(option, "", shown=key in first, instead=instead.get(key)) for key, option in options.items()]


def _entry(option: Option, value: str, *, shown: bool, instead: str | None = None) -> str:
    """One option: its help, and a line with ``value``, or one to fill in; or, if it is not ``shown``, a comment."""
    help_text = option.help or ""
    if option.choices is not None:
        help_text += f": {', '.join(option.choices)}"
    if instead is not None:
        help_text += f", instead of {instead}"
    comment = textwrap.fill(help_text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    if shown:
        return f"{comment}\n{option.key}: {value or ' # required'}"
    usual = option.default or option.metavar or option.name.upper()
    if option.type is bool:
        usual = str(option.default is True).lower()
    return f"{comment}\n# {option.key}: {usual}"


_FILE = Option("recipe", "a YAML file, or the report of a run", Path, "FILE", positional=True)
COMMAND = Command(
    "recipe",
    "a run or a whole job as one YAML file: write a template, check one, run one",
    parts=(
        Command(
            "init",
            "write a template with every option",
            (
                flag("job", "of a whole job: tune, sweep, unlearn, eval and report"),
                Option("out", "file to make, ending in .yaml or .yml (standard output)", Path, "FILE", makes=True),
                flag("overwrite", "replace FILE"),
            ),
            write_template,
        ),
        Command(
            "check",
            "whether a recipe is a whole run or job, correctly written",
            (_FILE, JSON),
            check_recipe,
            prints=True,
        ),
        Command(
            "run",
            "run the sections of a recipe; what is done already is left as it is",
            (
                _FILE,
                flag("overwrite", "replace what was made with other settings, or by other commands"),
                flag("quiet", "no progress bar, no summary"),
            ),
            run_recipe,
        ),
    ),
)

"""``perta recipe``: a template of a recipe, and a check of one."""

import argparse
import textwrap
from pathlib import Path

from perta_fast.cli import unlearn
from perta_fast.cli.choosing import check_choice
from perta_fast.cli.options import Command, Option, flag
from perta_fast.cli.recipe_options import alternatives, arguments_from, options_of, parser_of
from perta_fast.errors import InputError
from perta_fast.files.new_file import check_output_file, write_output_file

_HEAD = """\
# A run of perta unlearn. Check this file with: perta recipe check FILE
# and run it with: perta unlearn --recipe FILE
# Options on the command line win over those in here. Relative paths begin at this file's directory.
"""
_WIDTH = 100


def write_template(parsed: argparse.Namespace) -> int:
    text = template(unlearn.COMMAND)
    if parsed.out is None:
        print(text, end="")
        return 0
    check_output_file(parsed.out, (".yaml", ".yml"), overwrite=parsed.overwrite)
    write_output_file(parsed.out, text.encode(), overwrite=parsed.overwrite)
    return 0


def check_recipe(parsed: argparse.Namespace) -> int:
    from perta_fast.data.chat import ChatSettings
    from perta_fast.errors import printable
    from perta_fast.records.recipe import read_recipe
    from perta_fast.rules import Rule, check_strength
    from perta_fast.subtraction.scope import Scope

    path, command = parsed.recipe, unlearn.COMMAND
    settings = read_recipe(path)
    arguments = arguments_from(command, settings, path)
    named = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    missing = [" or ".join(keys) for keys in required(command) if named.isdisjoint(keys)]
    if missing:
        raise InputError(f"{path}: is not a whole run; it does not say: {', '.join(missing)}")
    run = parser_of(command).parse_args(arguments)
    try:
        run.command = command
        check_choice(run)
        if run.choose is None:
            check_strength(run.lam, run.max_retain_rise, run.stream, run.allow_zero)
            Rule.of_unlearn(run.rule, run.lam or 0.0, run.p, run.alpha, run.threshold)
        ChatSettings.of(run.system_prompt, run.date_string)
        Scope.of(run.only, run.leave)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    print(printable(f"{path}: a whole run, {len(settings)} settings"))
    return 0


def required(command: Command) -> list[list[str]]:
    """The keys that a whole run needs, one of each list."""
    needed = {key: option for key, option in options_of(command).items() if option.required}
    single = [[key] for key, option in needed.items() if not option.one_of]
    return single + [keys for keys in alternatives(command) if keys[0] in needed]


def template(command: Command) -> str:
    """A recipe with every option of ``command`` and its help; the user fills in those that are required."""
    first = {keys[0] for keys in required(command)}
    instead = {key: keys[0] for keys in alternatives(command) for key in keys[1:]}
    entries = []
    for key, option in options_of(command).items():
        help_text = option.help or ""
        if option.choices is not None:
            help_text += f": {', '.join(option.choices)}"
        if key in instead:
            help_text += f", instead of {instead[key]}"
        comment = textwrap.fill(help_text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        if key in first:
            entries.append(f"{comment}\n{key}:  # required")
        else:
            value = option.default or option.metavar or option.name.upper()
            if option.type is bool:
                value = str(option.default is True).lower()
            entries.append(f"{comment}\n# {key}: {value}")
    return "\n".join([_HEAD, "\n\n".join(entries), ""])


COMMAND = Command(
    "recipe",
    "a whole run as one YAML file: write a template, check one",
    parts=(
        Command(
            "init",
            "write a template with every option",
            (
                Option("out", "file to make, ending in .yaml or .yml (standard output)", Path, "FILE"),
                flag("overwrite", "replace FILE"),
            ),
            write_template,
        ),
        Command(
            "check",
            "whether a recipe is a whole run, correctly written",
            (Option("recipe", "a YAML file, or the report of a run", Path, "FILE", positional=True),),
            check_recipe,
            prints=True,
        ),
    ),
)

"""``perta recipe``: a template of a recipe, and a check of one."""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from perta_fast.cli import unlearn
from perta_fast.cli.options import rule_settings
from perta_fast.cli.recipe_options import RecipeParser, alternatives, arguments_from, options_of
from perta_fast.errors import InputError
from perta_fast.files.new_file import check_output_file, write_output_file

_HEAD = """\
# A run of perta unlearn. Check this file with: perta recipe check FILE
# and run it with: perta unlearn --recipe FILE
# Options on the command line come before those in here. Relative paths begin at this file's directory.
"""
_WIDTH = 100


def add(commands: Any) -> None:
    parser = commands.add_parser("recipe", help="a whole run as one YAML file: write a template, check one")
    parts = parser.add_subparsers(required=True, metavar="init|check")
    init = parts.add_parser("init", help="write a template with every option")
    init.add_argument(
        "--out", type=Path, metavar="FILE", help="file to make, ending in .yaml or .yml (standard output)"
    )
    init.add_argument("--overwrite", action="store_true", help="replace FILE")
    init.set_defaults(command=write_template)
    check = parts.add_parser("check", help="whether a recipe is a whole run, correctly written")
    check.add_argument("recipe", type=Path, metavar="FILE", help="a YAML file, or the report of a run")
    check.set_defaults(command=check_recipe)


def write_template(parsed: argparse.Namespace) -> int:
    text = template(unlearn_parser())
    if parsed.out is None:
        print(text, end="")
        return 0
    check_output_file(parsed.out, (".yaml", ".yml"), overwrite=parsed.overwrite)
    write_output_file(parsed.out, text.encode())
    return 0


def check_recipe(parsed: argparse.Namespace) -> int:
    from perta_fast.records.recipe import read_recipe
    from perta_fast.records.typed_json import printable
    from perta_fast.rules import Rule

    path, parser = parsed.recipe, unlearn_parser()
    settings = read_recipe(path)
    arguments = arguments_from(parser, settings, path)
    named = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    missing = [" or ".join(keys) for keys in required(parser) if named.isdisjoint(keys)]
    if missing:
        raise InputError(f"{path}: is not a whole run; it does not say: {', '.join(missing)}")
    run = rule_settings(parser.parse_args(arguments))
    try:
        Rule.of(run.pop("rule"), **run)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    print(printable(f"{path}: a whole run, {len(settings)} settings"))
    return 0


def unlearn_parser() -> argparse.ArgumentParser:
    """The parser of ``perta unlearn``."""
    commands = RecipeParser(prog="perta").add_subparsers()
    unlearn.add(commands)
    parser: argparse.ArgumentParser = commands.choices["unlearn"]
    return parser


def required(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The keys that a whole run needs: one of each list."""
    single = [[key] for key, action in options_of(parser).items() if action.required]
    groups = zip(alternatives(parser), parser._mutually_exclusive_groups, strict=True)
    return single + [keys for keys, group in groups if group.required]


def template(parser: argparse.ArgumentParser) -> str:
    """A recipe with every option of ``parser`` and its help; those that are required wait for their values."""
    first = {keys[0] for keys in required(parser)}
    instead = {key: keys[0] for keys in alternatives(parser) for key in keys[1:]}
    entries = []
    for key, action in options_of(parser).items():
        help_text = action.help or ""
        if action.choices is not None:
            help_text += f": {', '.join(map(str, action.choices))}"
        if key in instead:
            help_text += f", instead of {instead[key]}"
        comment = textwrap.fill(help_text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        if key in first:
            entries.append(f"{comment}\n{key}:  # required")
        else:
            value = "false" if action.nargs == 0 else action.default or action.metavar or action.dest.upper()
            entries.append(f"{comment}\n# {key}: {value}")
    return "\n".join([_HEAD, "\n\n".join(entries), ""])

"""The page of the command line, made from the tables that the parser itself is made from."""

from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from perta_fast.cli.command import Command, Option
from perta_fast.cli.main import COMMANDS

PAGE = "command-line.md"
_START = """\
# Command line

`perta COMMAND` runs one command; `perta COMMAND --help` or `perta help COMMAND` lists its options, which are written in
full. `-v` or `--verbose`, before or after the command, logs each phase on standard error, and `perta --version` names
the version.

With `--json`, standard output is one JSON object: the record that the command also writes to disk, where it writes one
([formats](formats.md)), and null for a number that is not finite. Whatever else is said goes to standard error.

Exit status: 0 done; 1 the run failed, and the message says what, where and how to go on; 2 bad arguments or bad
input, and nothing was done; 130 it was interrupted, and the message says how to go on.
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page in Markdown: every command with its options, in the order of the help."""
    return "\n".join([_START, *(line for command in COMMANDS for line in _section(command, "perta"))])


def _section(command: Command, above: str) -> Iterator[str]:
    name = f"{above} {command.name}"
    yield f"## {name}\n\n{command.help[0].upper()}{command.help[1:]}.\n"
    if command.options:
        yield "| option | meaning |\n|---|---|"
        yield from map(_row, command.options)
        yield ""
    for part in command.parts:
        yield from _section(part, name)


def _row(option: Option) -> str:
    value = "{" + ",".join(option.choices) + "}" if option.choices else option.metavar or option.name.upper()
    form = value if option.positional else f"--{option.key}"
    if not option.positional and option.type is not bool:
        form += f" {value}" + (f" [{value} ...]" if option.several else "")
    if option.negatable:
        form += f", --no-{option.key}"
    needed = "required" if option.required and not option.one_of else ""
    needed = "one of these is required" if option.required and option.one_of else needed
    meaning = "; ".join(filter(None, (option.help, needed)))
    return f"| `{form}` | {meaning} |"

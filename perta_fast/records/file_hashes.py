"""The list of an output's files, ``perta_files.b3``: one line for each with its hash, as ``b3sum --check`` reads it.

It lies beside the report, since a report cannot hold its own hash.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from perta_fast.checkpoints.companions import TEMPLATES, files_of
from perta_fast.errors import InputError
from perta_fast.files.hashing import hash_file
from perta_fast.files.reading import read_bytes
from perta_fast.records.report import FILE_NAME, Report

HASHES = "perta_files.b3"
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")


def write_hashes(output: Path, report: Report, moved: Mapping[str, Path] | None = None) -> None:
    """Write the list of the directory ``output``: its shards, of which the report has the hashes, and what is beside.

    moved: by their names in ``output``, files that will be moved there, the report among them; the list is written
    beside the report.
    """
    shards = report.output["files"]
    files = files_of(output) | dict(moved or {})
    hashes = {name: hash_file(path) for name, path in files.items() if name != HASHES and name not in shards}
    hashes |= {name: record["blake3"] for name, record in shards.items()}
    (files[FILE_NAME].parent / HASHES).write_bytes(_text(hashes))


def read_hashes(output: Path) -> dict[str, str]:
    """The hash of each file in the list, by name. Raises InputError if it is not a list that a run can have written."""
    path = output / HASHES
    content = read_bytes(path)
    hashes = {}
    for number, line in enumerate(content.decode(errors="surrogateescape").split("\n")[:-1], start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{path}, line {number}: is not a hash and a name")
        name = _unescaped(match[3]) if match[1] else match[3]
        if "\0" in name or Path(name).name != name.removeprefix(f"{TEMPLATES}/"):
            raise InputError(f"{path}, line {number}: {name} is not the name of a file beside it")
        hashes[name] = match[2]
    if FILE_NAME not in hashes:
        raise InputError(f"{path}: lacks {FILE_NAME}")
    if content != _text(hashes):
        raise InputError(f"{path}: is not as a run writes it: something was added, or lines are doubled or moved")
    return hashes


def _text(hashes: Mapping[str, str]) -> bytes:
    return "".join(_line(name, digest) for name, digest in sorted(hashes.items())).encode(errors="surrogateescape")


def _line(name: str, digest: str) -> str:
    """As b3sum writes it: a backslash comes first if the name has escapes."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _unescaped(name: str) -> str:
    return re.sub(r"\\(.)", lambda pair: "\n" if pair[1] == "n" else pair[1], name)

"""``--show-labels N``: rows with what carries loss marked, without any weight; the command itself does not run."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from perta_fast.arguments import check_sizes
from perta_fast.cli.importing import importing
from perta_fast.cli.streams import COLOUR_OFF, COLOUR_ON
from perta_fast.errors import InputError, printable
from perta_fast.rules import resolved_at

_FILES = ("data", "forget", "retain", "holdout")  # options that name data files


def show_labels(parsed: argparse.Namespace) -> int:
    """Print the first rows of each data file of a command as the model that is measured gets them."""
    if getattr(parsed, "json", False):
        raise InputError("--show-labels prints rows for a person; leave out --json")
    files = {role: getattr(parsed, role, None) for role in _FILES}
    if getattr(parsed, "suite", None):
        raise InputError("‹show_labels› is for data of your own; leave out the suite")
    if not any(files.values()):
        raise InputError("‹show_labels› needs data: name the file with the rows")
    with importing():
        from perta_fast.data.chat import ChatSettings
        from perta_fast.data.rows import read_data
        from perta_fast.files.hub import local_data, local_model
        from perta_fast.files.reading import exists

    check_sizes(1, parsed.max_length, show_labels=parsed.show_labels)
    chat = ChatSettings.of(parsed.system_prompt, parsed.date_string)
    model = local_model(_measured(parsed), parsed.download)
    if not exists(model / "config.json"):
        raise InputError(f"{model}: has no config.json; name the model whose tokenizer reads the rows")
    given = {role: local_data(path, parsed.download) for role, path in files.items() if path is not None}
    read = {role: read_data(path, parsed.fields)[0] for role, path in given.items()}
    with importing():
        from perta_fast.models.loading import row_samples, subject_without_weights

    subject = subject_without_weights(model, chat)
    for role, rows in read.items():
        chosen = rows[: parsed.show_labels]
        for row, samples in zip(chosen, row_samples(subject, chosen, parsed.max_length), strict=True):
            for number, sample in enumerate(samples, start=1):
                turn = f", turn {number} of {len(samples)}" if len(samples) > 1 else ""
                cut = ", cut to the length limit" if sample.truncated else ""
                count = f"{sample.label_count} of {len(sample.input_ids)} tokens carry loss"
                print(printable(f"{role}: {row.where}{turn}: {count}{cut}"))
                _print_marked(sample.pieces(subject.tokenizer))
    return 0


def _measured(parsed: argparse.Namespace) -> Path:
    """The checkpoint whose tokenizer the command takes. Raises InputError if none is named."""
    at = getattr(parsed, "at", "model") or resolved_at(parsed.rule, None)
    at_base = getattr(parsed, "model", None) is None or at == "base"
    path: Path | None = getattr(parsed, "base", None) if at_base else parsed.model
    if path is None:
        raise InputError("‹show_labels› needs the model whose tokenizer reads the rows: give --model")
    return path


def _print_marked(pieces: Iterable[tuple[str, bool]]) -> None:
    """Write the text of a sample; what carries loss in colour on a terminal, in brackets elsewhere."""
    begin, end = (COLOUR_ON, COLOUR_OFF) if sys.stdout.isatty() else ("⟦", "⟧")
    for text, carries in pieces:
        for part in (begin, text, end) if carries else (text,):
            sys.stdout.write(part)
    sys.stdout.write("\n\n")

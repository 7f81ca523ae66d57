"""``perta ratio``."""

import argparse
from pathlib import Path

from perta_fast.cli import options
from perta_fast.cli.command import Command, Option, Outcome, made
from perta_fast.cli.importing import importing
from perta_fast.dtypes import STORED_TYPES


def run(parsed: argparse.Namespace) -> Outcome:
    with importing():
        from perta_fast.importance.ratio import ImportanceRatio
        from perta_fast.importance.store import as_strings
        from perta_fast.records.importance_record import importance_record

    ratio = ImportanceRatio.of(parsed.forget_importance, parsed.retain_importance, dtype=parsed.importance_dtype)
    ratio.save(parsed.out, overwrite=parsed.overwrite, progress=not parsed.quiet)
    sides = {side: importance_record(as_strings(metadata)) for side, metadata in ratio.metadata.items()}
    record = {"path": str(parsed.out), "dtype": parsed.importance_dtype, "tensors": len(ratio.tensors), **sides}
    return made(record, f"ratio of {len(ratio.tensors)} tensors, {ratio.estimator}", parsed.out)


COMMAND = Command(
    "ratio",
    "the ratio of two importances, which takes their place at 2 bytes a parameter",
    (
        Option("forget_importance", "what perta importance made", Path, "DIR", required=True),
        Option("retain_importance", "the same of the data to keep", Path, "DIR", required=True),
        Option("importance_dtype", "type to store (bfloat16)", default="bfloat16", choices=tuple(STORED_TYPES)),
        *options.OUTPUT,
    ),
    run,
)

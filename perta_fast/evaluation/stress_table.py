"""The stresses of an evaluation as lines for a person."""

from collections.abc import Mapping
from typing import Any

METRICS = ("loss", "probability", "extraction_strength", "exact_memorization")
BEFORE, REST = "before", "forget_not_relearned"
_SETS = {REST: "forget without those relearned"}


def stress_lines(stress: Mapping[str, Any]) -> list[str]:
    """A table of each set before and under each stress, and a line on the codes that have changed, if counted."""
    lines = []
    for role, count in stress.get("rows", {}).items():
        scores = {word: sets[role] for word, sets in stress["scores"].items() if role in sets}
        width = max(map(len, scores))
        lines.append(f"under stress: {_SETS.get(role, role)}, {count} rows")
        lines.append("".join(f"  {head}" for head in (" " * width, *METRICS)))
        for word, values in scores.items():
            cells = (f"{values[metric]:>{len(metric)}.4g}" for metric in METRICS)
            lines.append("".join(f"  {cell}" for cell in (f"{word:{width}}", *cells)))
    if codes := stress.get("codes"):
        total = sum(tensor["elements"] for tensor in codes["tensors"].values())
        shares = ", ".join(f"{100 * share:.2f} % as {kind}" for kind, share in codes["share"].items())
        lines.append(f"codes of linear maps that differ from {codes['before']}: {shares}, of {total:,}")
    return lines

"""Tables of benchmark rows, for the terminal and for RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]

MISSING = "not yet measured"


def seconds_text(seconds: float) -> str:
    """A duration with three significant digits, in s, ms or µs."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def bytes_text(size: float | None) -> str:
    """A size in MB (10^6 bytes)."""
    return "" if size is None else f"{size / 1e6:,.0f} MB"


def ratio(row: Row, other: Row) -> float:
    """Median over rounds of ``row``'s time divided by ``other``'s in the same round."""
    pairs = zip(row["seconds"], other["seconds"], strict=False)
    return float(median(numerator / denominator for numerator, denominator in pairs))


def rate(row: Row, quantity: str) -> float | None:
    """Units of 10^9 ``quantity`` ("bytes" or "flops") per second at the median time; None if the row has none."""
    return row[quantity] / median(row["seconds"]) / 1e9 if row.get(quantity) else None


def fastest(rows: Sequence[Row], role: str) -> Row | None:
    """The row with this role whose median time is smallest."""
    candidates = [row for row in rows if row["role"] == role and row.get("seconds")]
    return min(candidates, key=lambda row: median(row["seconds"]), default=None)


def table(rows: Sequence[Row]) -> list[str]:
    """The Markdown lines of one group's table; columns that are empty in every row are left out.

    "time / ours" is the median of the ratios within rounds. "of limit" is the rate, in bytes or FLOPs per second,
    divided by that of the fastest limit.
    """
    ours, limit = fastest(rows, "ours"), fastest(rows, "limit")
    header = ["contender", "role", "median", "fastest – slowest", "time / ours", "GB/s", "GFLOP/s", "of limit"]
    header += ["peak RSS", "peak anonymous", "note"]
    body: list[list[str]] = []
    for row in rows:
        if not row.get("seconds"):
            body.append([row["contender"], row["role"], MISSING] + [""] * 7 + [row.get("note", "")])
            continue
        times = row["seconds"]
        bytes_rate, flops_rate = rate(row, "bytes"), rate(row, "flops")
        share = ""
        for quantity in ("bytes", "flops"):
            row_rate, limit_rate = rate(row, quantity), rate(limit, quantity) if limit else None
            if row_rate and limit_rate and row is not limit:
                share = f"{row_rate / limit_rate:.2f}"
        body.append(
            [
                row["contender"],
                row["role"],
                seconds_text(median(times)),
                f"{seconds_text(min(times))} – {seconds_text(max(times))}",
                f"{ratio(row, ours):.2f}" if ours else "",
                f"{bytes_rate:.1f}" if bytes_rate else "",
                f"{flops_rate:.0f}" if flops_rate else "",
                share,
                bytes_text(row.get("peak_rss")),
                bytes_text(row.get("peak_anonymous")),
                row.get("note", ""),
            ]
        )
    columns = [k for k in range(len(header)) if any(cells[k] for cells in body)]
    lines = ["| " + " | ".join(cells[k] for k in columns) + " |" for cells in (header, *body)]
    lines.insert(1, "|" + "---|" * len(columns))
    return lines


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by group, in the order of ``rows``."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row["group"], []).append(row)
    return result

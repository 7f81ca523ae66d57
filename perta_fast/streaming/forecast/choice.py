"""The choice of a schedule for a streamed run, within its limits of memory and disk, and a description of its costs."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from perta_fast.errors import InputError
from perta_fast.files.disk_space import existing_parent, free_bytes, share_a_disk
from perta_fast.files.new_directory import leftovers
from perta_fast.memory import PeakMemory, available_bytes, format_duration, format_size
from perta_fast.streaming.forecast.costs import Costs, Estimate
from perta_fast.streaming.forecast.rates import Rates, measure_rates
from perta_fast.streaming.schedule import Schedule

_MARGIN = 0.05  # share of the free disk that is not used


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take.

    scratch: disk for scratch files and the result together. memory (of the whole process), device_memory: None sets no
    limit. ranks: processes that share the disk; each is counted like the one with the most data, and has this memory.
    kept: disk for the importances that are kept; None if they are part of the result on the same disk.
    """

    scratch: int
    memory: int | None = None
    device_memory: int | None = None
    ranks: int = 1
    kept: int | None = None

    @classmethod
    def at(
        cls,
        destination: Path,
        memory: int | None,
        device_memory: int | None,
        ranks: int = 1,
        kept_at: Path | None = None,
    ) -> "Budget":
        """A budget with the free disk space at ``destination``, less a margin, and at ``kept_at`` if that is elsewhere.

        What a run that was killed has left at both counts as free.
        """
        emptied = [path for final in (destination, kept_at) if final is not None for path in leftovers(final)]
        apart = kept_at is not None and not share_a_disk(kept_at, destination)
        here, there = (int(free_bytes(path, emptied) * (1 - _MARGIN)) for path in (destination, kept_at or destination))
        return cls(here, memory, device_memory, ranks, there if apart else None)


@dataclass(frozen=True)
class Chosen:
    """A schedule and the reasons for it.

    baseline: memory of the process before the run. shortage: why the disk is too small, or "".
    """

    estimate: Estimate
    budget: Budget
    schedule: Schedule
    baseline: int
    reasons: list[str]
    shortage: str

    @cached_property
    def costs(self) -> Costs:
        """What the schedule costs. Without limits of memory the choice does not need it, and it can take seconds."""
        return self.estimate.costs(self.schedule)

    @property
    def warnings(self) -> list[str]:
        """What is not enough, the memory that is available now included."""
        warnings = [self.shortage] if self.shortage else []
        needed, free = self.costs.host_bytes, available_bytes()
        if self.budget.memory is None and free is not None and needed > free:
            warnings.append(
                f"this needs {format_size(needed)} of memory, {format_size(free)} are available; "
                "--memory chooses what fits"
            )
        return warnings

    def check(self) -> None:
        """Raise InputError if the disk is too small."""
        if self.shortage:
            raise InputError(self.shortage)


def choose_schedule(estimate: Estimate, batch_size: int, budget: Budget) -> Chosen:
    """The largest batch up to ``batch_size`` that fits, then overlap, then the least work that the disk allows.

    Raises InputError, naming the memory that is needed, if even single samples do not fit. If the scratch files do not
    fit on the disk, the result has a ``shortage``, and the schedule is the one with the smallest files.
    """
    with PeakMemory() as now:
        pass
    baseline = now.baseline
    reasons = []
    schedule = Schedule(batch_size, overlap=estimate.overlaps)
    if not _fits(estimate, schedule, budget, baseline):
        slow = Schedule(batch_size, overlap=False)
        if not _fits(estimate, replace(slow, batch_size=1), budget, baseline):
            raise InputError(_too_little(estimate, budget, baseline))
        size = _last(1, batch_size, lambda n: _fits(estimate, replace(slow, batch_size=n), budget, baseline))
        schedule = replace(slow, batch_size=size)
        if size < batch_size:
            reasons.append(f"batches of {batch_size} would not fit into the memory")
        if _fits(estimate, replace(schedule, overlap=estimate.overlaps), budget, baseline):
            schedule = replace(schedule, overlap=estimate.overlaps)
        else:
            reasons.append("no overlap: two parts at once would not fit into the memory")
    schedule, shortage = _within_disk(estimate, schedule, budget, reasons)
    return Chosen(estimate, budget, schedule, baseline, reasons, shortage)


def schedule_for(
    estimate: Estimate,
    batch_size: int,
    destination: Path,
    memory: int | None,
    device_memory: int | None,
    shard: Path,
    announce: bool,
    ranks: int = 1,
    kept_at: Path | None = None,
) -> Schedule:
    """The schedule of a run to ``destination`` that is about to start.

    estimate: for the rank with the most data. shard: of the model, whose reading is timed. announce: print the costs on
    standard error. kept_at: where importances are kept, if not in the result. Raises InputError if memory or disk are
    too small.
    """
    chosen = choose_schedule(estimate, batch_size, Budget.at(destination, memory, device_memory, ranks, kept_at))
    chosen.check()
    if announce:
        print(describe(chosen, rates_for(chosen, destination, shard), ranks), file=sys.stderr)
    return chosen.schedule


def _fits(estimate: Estimate, schedule: Schedule, budget: Budget, baseline: int) -> bool:
    if budget.memory is None and budget.device_memory is None:
        return True
    host, device = estimate.memory(schedule)
    return (budget.memory is None or baseline + sum(host.values()) <= budget.memory) and (
        budget.device_memory is None or sum((device or {}).values()) <= budget.device_memory
    )


def _too_little(estimate: Estimate, budget: Budget, baseline: int) -> str:
    host, device = estimate.memory(Schedule(1, overlap=False))
    host = {**host, "interpreter and libraries": baseline}
    messages = []
    limits = (("memory", budget.memory, host), ("device memory", budget.device_memory, device or {}))
    for option, limit, kinds in limits:
        needed = sum(kinds.values())
        if limit is not None and needed > limit:
            largest = max(kinds, key=lambda kind: kinds[kind])
            messages.append(
                f"{option} of {format_size(limit)} cannot hold one part of the model: it needs at least {needed} bytes "
                f"({format_size(needed)}), of which {largest} take {format_size(kinds[largest])}"
            )
    return "; ".join(messages)


def _within_disk(estimate: Estimate, schedule: Schedule, budget: Budget, reasons: list[str]) -> tuple[Schedule, str]:
    if budget.kept is not None and budget.kept < estimate.kept_bytes:
        return schedule, (
            f"the disk of ‹save_importance› has {format_size(budget.kept)} for the {format_size(estimate.kept_bytes)} "
            "that are kept there; name a directory on a larger disk"
        )
    result = estimate.result_bytes - (0 if budget.kept is None else estimate.kept_bytes)
    free = (budget.scratch - result) // budget.ranks
    layers = len(estimate.structure.layers)
    needed = {every: estimate.scratch(replace(schedule, every=every)) for every in range(1, layers + 1)}
    every = next((every for every, size in needed.items() if size <= free), None)
    if every is not None:
        if every > 1:
            reasons.append(
                f"hidden states at every boundary would take {format_size(needed[1])} of scratch disk, "
                f"{format_size(free)} are free"
            )
        return replace(schedule, every=every), ""
    least = replace(schedule, every=min(needed, key=lambda every: needed[every]))
    most = max(math.ceil(len(lengths) / schedule.batch_size) for lengths in estimate.load.lengths)
    with_most = estimate.scratch(replace(least, groups=most))
    if with_most > free:
        if with_most < needed[least.every]:
            least = replace(least, groups=most)
        scratch = budget.ranks * min(with_most, needed[least.every])
        return least, (
            f"the disk has {format_size(max(0, budget.scratch))} for the result of "
            f"{format_size(result)} and scratch files of at least {format_size(scratch)}; write to a "
            "larger disk, or use fewer or shorter samples"
        )
    groups = most - _last(0, most - 1, lambda fewer: estimate.scratch(replace(least, groups=most - fewer)) <= free)
    reasons.append(f"in one group the scratch files would take {format_size(needed[least.every])}")
    return replace(least, groups=groups), ""


def _last(begin: int, end: int, holds: Callable[[int], bool]) -> int:
    """The last number of [begin, end] for which ``holds``; it holds from ``begin`` up to some number."""
    while begin < end:
        middle = (begin + end + 1) // 2
        begin, end = (middle, end) if holds(middle) else (begin, middle - 1)
    return begin


def rates_for(chosen: Chosen, destination: Path, shard: Path | None) -> Rates:
    """Rates for the model's type and width, on its device, in the directory that the run will write to."""
    estimate = chosen.estimate
    longest = max(map(max, estimate.load.lengths))
    return measure_rates(
        estimate.width,
        chosen.schedule.batch_size * longest,
        estimate.dtype,
        estimate.here,
        existing_parent(destination),
        shard,
        double=chosen.costs.double_flops > 0,
    )


def describe(chosen: Chosen, rates: Rates, ranks: int = 1) -> str:
    """The estimate in a few lines."""
    schedule, costs = chosen.schedule, chosen.costs
    lines = [f"for each of {ranks} processes that make the result together:"] if ranks > 1 else []
    lines += [
        "memory: "
        + _kinds({**costs.host, "interpreter and libraries": chosen.baseline})
        + (" (bounds from shapes: this model's code needs values)" if costs.bound else "")
    ]
    if costs.device is not None:
        lines.append(f"device memory: {_kinds(costs.device)}")
    lines += [
        f"disk: {format_size(costs.scratch)} of scratch, {format_size(costs.result_written)} of result",
        f"read {format_size(costs.weights_read)} of weights and {format_size(costs.result_read)} to subtract, "
        f"write {format_size(costs.result_written)}; "
        f"{format_size(costs.scratch_moved)} through the scratch disk",
        f"arithmetic: {costs.flops:.3g} FLOP in matrix products"
        + (f", {costs.double_flops:.3g} in float64" if costs.double_flops else ""),
        f"time: about {format_duration(rates.seconds(costs, schedule.overlap))} at {rates}",
        f"schedule: {chosen.estimate.plan(schedule)}",
        *(f"  because {reason}" for reason in chosen.reasons),
        *(f"warning: {warning}" for warning in chosen.warnings),
    ]
    return "\n".join(lines)


def _kinds(kinds: Mapping[str, int]) -> str:
    parts = ", ".join(f"{kind} {format_size(size)}" for kind, size in kinds.items() if size)
    return f"{format_size(sum(kinds.values()))} ({parts})"

"""How a streamed sweep walks: batches within the memory, settings within the disk, one walk or two."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from perta_fast.scoring.search import CLOSER
from perta_fast.streaming.forecast.choice import Budget, choose_schedule, rates_for
from perta_fast.streaming.forecast.forecast import Forecast
from perta_fast.streaming.forecast.forward_costs import ForwardEstimate
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping.coarse import coarse, pays
from perta_fast.sweeping.request import Request
from perta_fast.sweeping.unfinished import WalkPlan


@dataclass(frozen=True)
class Planning:
    """What a plan is made from.

    estimate: of so many versions. count: of all versions. curves: of settings that have to keep a bound; 0 if none has
    to. folder: of the hidden states. shard: of the model, whose reading is timed. ranks: how many processes.
    """

    estimate: Callable[[int], ForwardEstimate]
    count: int
    curves: int
    request: Request
    folder: Path
    shard: Path
    ranks: int

    def plan(self, announce: bool) -> tuple[WalkPlan, Forecast | None]:
        """The plan, and, to announce it, what it costs. Raises InputError if memory or disk are too small."""
        request, strengths = self.request, self.request.strengths or []
        budget = Budget.at(self.folder, request.memory, request.device_memory, self.ranks)
        alone = choose_schedule(self.estimate(1), request.batch_size, budget)
        alone.check()
        schedule, most = self._fewest_walks(alone.schedule, budget.scratch // self.ranks)
        may_skip = self.curves > 0 and len(coarse(strengths)) < len(strengths)
        if not (announce or may_skip):
            return WalkPlan(schedule.batch_size, schedule.overlap, most, groups=schedule.groups), None
        estimate = self.estimate(min(most, self.count))
        chosen = choose_schedule(estimate, schedule.batch_size, budget)
        rates = rates_for(chosen, self.folder, self.shard)
        reading, forward = estimate.seconds_to_read(schedule, rates), estimate.seconds_of_version(schedule, rates)
        twice = may_skip and pays(self.curves, strengths, reading, forward, most)
        plan = WalkPlan(schedule.batch_size, schedule.overlap, most, twice, schedule.groups)
        return plan, Forecast.of(chosen, rates, self.ranks).followed_by(f"\n{self._in_words(plan)}")

    def _fewest_walks(self, least: Schedule, free: int) -> tuple[Schedule, int]:
        """At least the groups of ``least``, and how many versions at once: so that the inputs are read least often."""
        estimate = self.estimate(1)
        batches = max(math.ceil(len(lengths) / least.batch_size) for lengths in estimate.load.lengths)
        cuts = [replace(least, groups=groups) for groups in range(least.groups, max(least.groups, batches) + 1)]
        found = [(cut, estimate.most_versions(cut, free)) for cut in cuts]
        return min(found, key=lambda cut: cut[0].groups * math.ceil(self.count / cut[1]))

    def _in_words(self, plan: WalkPlan) -> str:
        """How many walks, and what each is of."""
        closer = ""
        if self.curves and self.request.searches_streamed:
            closer = f"; then up to {self.curves * CLOSER} settings closer to the bound are scored as well"
        return f"{self._walks_in_words(plan)}{closer}"

    def _walks_in_words(self, plan: WalkPlan) -> str:
        walks = plan.groups * math.ceil(self.count / plan.most)
        if plan.twice:
            first = ", ".join(f"{lam:g}" for lam in coarse(self.request.strengths or []))
            return f"walks: first with lambda {first}, then with those between that may keep the bound"
        part = " and a part of the samples" if plan.groups > 1 else ""
        if walks == 1:
            return "walks: one; no setting is skipped in it"
        each = f"each with at most {plan.most} of {self.count} settings{part}"
        return f"walks: {walks}, {each}, for which the disk has room"

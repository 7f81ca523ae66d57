"""Work dealt to ranks: the same on every rank, at about the same cost for each."""

from collections.abc import Sequence
from heapq import heapreplace


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The numbers of each rank's items, in ascending order; every item goes to one rank.

    costs: of each item, in any unit (tokens, bytes). Items go out in descending order of cost, each to the rank with
    the lowest total: no rank has more than 4/3 of what the best deal would give it (Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [(0, 0, rank) for rank in range(ranks)]  # a heap: cost so far, items, rank
    for item in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        cost, count, rank = totals[0]
        dealt[rank].append(item)
        heapreplace(totals, (cost + costs[item], count + 1, rank))
    return [sorted(items) for items in dealt]

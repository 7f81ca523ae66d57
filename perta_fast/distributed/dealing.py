"""Work dealt to ranks: the same on every rank, and about as much for each."""

from collections.abc import Sequence
from heapq import heapreplace


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
    """The numbers of the pieces of each hand, in ascending order; every piece is in one hand.

    costs: of each piece, in any unit (tokens, bytes). The costliest piece goes first, each to the hand with the
    least so far: no hand has more than 4/3 of what the best deal would give it (Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    filled = [(0, 0, hand) for hand in range(hands)]  # a heap: cost so far, pieces, hand
    for piece in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        cost, count, hand = filled[0]
        dealt[hand].append(piece)
        heapreplace(filled, (cost + costs[piece], count + 1, hand))
    return [sorted(each) for each in dealt]


def stretch(count: int, hand: int, hands: int) -> slice:
    """Of ``count`` equal pieces in a row, those of one hand; the hands' follow each other."""
    return slice(count * hand // hands, count * (hand + 1) // hands)

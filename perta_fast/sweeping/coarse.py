"""Whether a streamed sweep first walks with some of its strengths, then with those of the others that may matter."""

import math
from collections.abc import Sequence


def coarse(strengths: Sequence[float]) -> list[float]:
    """The strengths of a first walk: every second one above 0, beginning with the second, and all below 0."""
    rising = sorted(strengths)
    above = [lam for lam in rising if lam > 0]
    return [lam for lam in rising if lam <= 0] + above[1::2]


def pays(curves: int, strengths: Sequence[float], reading: float, forward: float, most: int) -> bool:
    """Whether walking again is likely to cost less than the forward passes that the first walk saves.

    curves: on each of which ``strengths`` are tried. reading: seconds to read all inputs, for each walk. forward:
    seconds of one setting's forward pass. most: settings of one walk. Expected is that half of the strengths that the
    first walk leaves out need no pass, since a smaller one has broken the bound.
    """
    first = curves * len(coarse(strengths)) + 1  # and the model as it is
    finer = curves * len(strengths) + 1 - first
    walks = math.ceil(first / most) + math.ceil(finer / 2 / most) - math.ceil((first + finer) / most)
    return finer / 2 * forward > walks * reading

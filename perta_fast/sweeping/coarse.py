"""Whether a streamed sweep walks twice: first with some of its strengths, then with those that may keep the bound."""

from collections.abc import Sequence


def coarse(strengths: Sequence[float]) -> list[float]:
    """The strengths of a first walk: every second one above 0, beginning with the second, and all below 0."""
    rising = sorted(strengths)
    above = [lam for lam in rising if lam > 0]
    return [lam for lam in rising if lam <= 0] + above[1::2]


def pays(curves: int, strengths: Sequence[float], reading: float, forward: float) -> bool:
    """Whether a second walk is likely to cost less than the forward passes that the first one saves.

    curves: on each of which ``strengths`` are tried. reading: seconds to read all inputs once. forward: seconds of one
    setting's forward pass. Expected is that half of the strengths that the first walk leaves out need no pass, since a
    smaller one has broken the bound.
    """
    finer = len(strengths) - len(coarse(strengths))
    return curves * finer / 2 * forward > reading

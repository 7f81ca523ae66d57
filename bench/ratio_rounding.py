"""What a run changes if it takes the ratio of both importances in bfloat16 or in 8 bits, on files of a real model.

    python -m bench.ratio_rounding --model M --base B --tuned T --forget-importance F --retain-importance R

Takes θ in bfloat16. Prints, for several p and α at λ = 1: the largest and the mean error of w; the share of the
elements of θ whose stored value differs from that by the pair in float32, beside the share that the run changes at all;
and, over the norm of the step, the norm of what the steps differ by, and of what rounding θ does to the step anyway.
Ratios in 8 bits are not offered: the table says what they would do.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from perta_fast import ops
from perta_fast.importance.ratio import ratio_of
from perta_fast.ops import reference
from perta_fast.rules import Rescaling, Rule
from perta_fast.subtraction.inputs import Sources, open_importances

_CHUNK = 1 << 22  # elements at a time
_HEAD = """\
| ratio | p | α | w off by at most | on average | θ that differ | θ that change | step off | rounding of θ |
|---|---|---|---|---|---|---|---|---|"""


def in_bfloat16(forget: Tensor, retain: Tensor) -> Tensor:
    """The ratio as files keep it."""
    return ratio_of(forget, retain, torch.bfloat16)


def in_8_bits(forget: Tensor, retain: Tensor) -> Tensor:
    """The nearest power of 2^(1/4), in float32: from 2^-31.5 to 2^31.5, below that 0, above it infinite; 255 values."""
    quarters = (4 * ratio_of(forget, retain, torch.float32).log2()).round()
    return (quarters / 4).exp2().where(quarters >= -126, 0.0).where(quarters <= 126, torch.inf)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bfloat16": in_bfloat16, "8 bits": in_8_bits}


class Sums:
    """Sums over elements, for one setting. way: how the ratio is rounded, of ``WAYS``."""

    def __init__(self, way: str, how: Rescaling) -> None:
        self._way, self._how = way, how
        self.count = self.differ = self.changed = 0
        self.largest = self.error = self.step = self.step_off = self.rounding = 0.0

    def add(self, theta: Tensor, tuned: Tensor, base: Tensor, forget: Tensor, retain: Tensor) -> None:
        """Compare the ratio with the pair on elements of one tensor."""
        how, ratio = self._how, WAYS[self._way](forget, retain)
        w, w_of_ratio = reference.weights(forget, retain, how), reference.weights_of_ratio(ratio, how)
        settings = vars(how)
        by_pair = ops.rescaled_subtract(theta, tuned, base, forget, retain, **settings)
        by_ratio = ops.rescaled_subtract(theta, tuned, base, ratio=ratio, **settings)
        moved, task = (w_of_ratio.double() - w).abs(), tuned.double() - base.double()
        self.count += theta.numel()
        self.differ += int((by_pair != by_ratio).sum())
        self.changed += int((by_pair != theta).sum())
        self.largest = max(self.largest, float(moved.max()))
        self.error += float(moved.sum())
        self.step += float((w * task).square().sum())
        self.step_off += float((moved * task).square().sum())
        self.rounding += float((by_pair.double() - (theta.double() - w * task)).square().sum())

    def row(self) -> str:
        """A line of the table."""
        how = self._how
        off = [(squares / self.step) ** 0.5 for squares in (self.step_off, self.rounding)]
        return (
            f"| {self._way} | {how.p:g} | {how.alpha:g} | {self.largest:.1e} | {self.error / self.count:.1e} | "
            f"{self.differ / self.count:.2%} | {self.changed / self.count:.2%} | {off[0]:.1e} | {off[1]:.1e} |"
        )


def _chunks(sources: Sources) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Theta, tuned, base and both importances, some elements at a time."""
    for match in sources.matches:
        operands = list(sources.operands(match))
        if match.copied is not None or len(operands) != 5:
            continue
        for begin in range(0, match.common, _CHUNK):
            count = min(_CHUNK, match.common - begin)
            theta, tuned, base, forget, retain = (of.elements(entry, begin, count) for _, of, entry in operands)
            yield theta.bfloat16(), tuned, base, forget, retain


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "base", "tuned", "forget-importance", "retain-importance"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rule", default="fisher", help="one that takes these importances (fisher)")
    given = parser.parse_args()
    rule = Rule.of(given.rule, 1.0)
    importances = open_importances(rule, given.forget_importance, given.retain_importance)
    sources = Sources.open(given.model, given.base, given.tuned, importances)
    settings = [Rescaling(1.0, p, alpha) for p in (0.5, 1.0, 2.0) for alpha in (1.0, 16.0)]
    table = [Sums(way, how) for way in WAYS for how in settings]
    for arrays in _chunks(sources):
        for sums in table:
            sums.add(*arrays)
    print(_HEAD)
    for sums in table:
        print(sums.row())


if __name__ == "__main__":
    main()

"""What walks will take, as text for a person and as figures for a program."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from perta_fast.streaming.forecast.choice import Chosen, describe
from perta_fast.streaming.forecast.rates import Rates


@dataclass(frozen=True)
class Forecast:
    """The costs of one walk, or of several. walks: the figures of each, in bytes, seconds and FLOP."""

    text: str
    walks: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, chosen: Chosen, rates: Rates, ranks: int, data: dict[str, dict[str, int]] | None = None) -> "Forecast":
        """That of one walk. ranks: processes; the figures are those of one. data: samples and tokens, by role."""
        costs, schedule = chosen.costs, chosen.schedule
        figures = ({} if data is None else {"data": data}) | asdict(costs)
        figures |= {
            "libraries": chosen.baseline,
            "seconds": rates.seconds(costs, schedule.overlap),
            "rates": asdict(rates),
            "schedule": asdict(schedule),
            "reasons": chosen.reasons,
            "warnings": chosen.warnings,
            "processes": ranks,
        }
        return cls(describe(chosen, rates, ranks), (figures,))

    @classmethod
    def joined(cls, parts: Iterable[tuple[str, "Forecast"]], between: str = "\n\n") -> "Forecast":
        """Those of several walks, each with what it is of."""
        texts, walks = [], []
        for what, forecast in parts:
            texts.append(f"{what}\n{forecast.text}")
            walks += [{"of": what.rstrip(":"), **walk} for walk in forecast.walks]
        return cls(between.join(texts), tuple(walks))

    def after(self, text: str) -> "Forecast":
        """The same with ``text`` before its own."""
        return replace(self, text=f"{text}{self.text}")

    def followed_by(self, text: str) -> "Forecast":
        """The same with ``text`` after its own."""
        return replace(self, text=f"{self.text}{text}")

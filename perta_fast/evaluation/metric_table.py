"""The metrics that a suite offers, by name; each is computed when it is asked for, and what several need once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from perta_fast.data.samples import Sample
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.evaluation.examinee import Examinee, Scored
from perta_fast.evaluation.results import Metric
from perta_fast.models.scores import TokenScores

T = TypeVar("T")

# Names for several metrics. Any other name may be a pattern too, such as forget_* or *_ROUGE.
GROUPS = {
    "all": ("*",),
    "probability": ("*_Prob", "*_Prob_normalised", "*_loss"),
    "rouge": ("*ROUGE*",),
    "truth_ratio": ("*[Tt]ruth_[Rr]atio",),
    "memorization": ("*extraction_strength", "*exact_memorization"),
    "membership": ("mia_*", "privleak*"),
}
DEFAULT = "default"


GENERATED, GRADIENTS = "generated text", "gradients"  # what a metric may need beside token scores


@dataclass(frozen=True)
class _Offer:
    compute: Callable[[], Metric]
    default: bool
    needs: str


class MetricTable:
    """What can be measured on the data of a suite (``files``, by their roles). Made before a model is loaded.

    lacking: what a metric that is not offered would need.
    """

    examinee: Examinee  # set by ``measure``

    def __init__(self, files: Mapping[str, DataFile]) -> None:
        self.files = files
        self.lacking: dict[str, str] = {}
        self._offers: dict[str, _Offer] = {}
        self._made: dict[str, object] = {}

    @property
    def names(self) -> list[str]:
        """The metrics that are offered."""
        return list(self._offers)

    def samples(self, role: str) -> list[Sample]:
        """The tokenised forget or holdout set, of which membership is scored."""
        raise NotImplementedError

    def scored(self, role: str) -> Scored:
        """Scores and texts of the answers of these sets."""
        raise NotImplementedError

    forget_file = "forget"  # the file that a stress needs

    def stress_sets(self) -> dict[str, tuple[list[Sample], list[TokenScores]]]:
        """The forget set, and the retain set if there is one: what is scored again under stress, and its scores."""
        roles = [role for role in ("forget", "retain") if role in self.files]
        return {role: (self.samples(role), [scores for scores, _ in self.scored(role)]) for role in roles}

    def offer(self, name: str, compute: Callable[[], Metric], *, default: bool = True, needs: str = "") -> None:
        """Add a metric. default: whether it is computed unless metrics are chosen. needs: what beside token scores."""
        self._offers[name] = _Offer(compute, default, needs)

    def once(self, what: str, make: Callable[[], T]) -> T:
        """The result of ``make``, which several metrics need, made at the first call with ``what``."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]  # type: ignore[return-value]

    def metric(self, name: str) -> Metric:
        """One metric, computed once."""
        return self.once(f"metric {name}", self._offers[name].compute)

    def chosen(self, wanted: Sequence[str] | None) -> list[str]:
        """The names of the metrics that ``wanted`` (names, patterns, groups; None: the default) stands for.

        Raises InputError for one that stands for none.
        """
        names: set[str] = set()
        for word in [DEFAULT] if wanted is None else wanted:
            found = self._named(word)
            if not found:
                raise InputError(f"metrics: {word!r} is no metric of this data{self._advice(word)}")
            names.update(found)
        if not names:
            raise InputError("metrics: names none")
        return [name for name in self._offers if name in names]

    def chosen_of_scores(self, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """``chosen``, divided: what is made of token scores alone, and the rest.

        Raises InputError too for a metric of the rest that is named in full, and if nothing else is chosen.
        """
        names = self.chosen(wanted)
        rest = [name for name in names if self._offers[name].needs]
        named = [name for name in rest if wanted is not None and name in wanted]
        if named or len(rest) == len(names):
            name = (named or rest)[0]
            raise InputError(
                f"metrics: {name} needs {self._offers[name].needs}, and a model that is walked layer by layer gives "
                "token scores alone; leave it out, or leave ‹stream› out"
            )
        return [name for name in names if name not in rest], rest

    def measure(self, examinee: Examinee, names: Sequence[str]) -> dict[str, Metric]:
        """Compute the metrics of these names, and what they need; nothing is left of another examinee."""
        self.examinee, self._made = examinee, {}
        for role, file in self.files.items():
            examinee.note_file(role, file)
        return {name: self.metric(name) for name in names}

    def _named(self, word: str) -> list[str]:
        if word == DEFAULT:
            return [name for name, offer in self._offers.items() if offer.default]
        patterns = GROUPS.get(word, (word,))
        return [name for name in self._offers if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def _advice(self, word: str) -> str:
        if word in self.lacking:
            return f": {word} needs {self.lacking[word]}"
        if word in GROUPS:
            return ": none of this group can be computed from it (membership needs a holdout set)"
        known = [*self._offers, DEFAULT, *(group for group in GROUPS if self._named(group))]
        by_lower = {name.lower(): name for name in known}
        near = get_close_matches(word.lower(), by_lower, n=1)
        meant = f"; did you mean {by_lower[near[0]]}?" if near else "."
        return f"{meant} There are: {', '.join(known)}"

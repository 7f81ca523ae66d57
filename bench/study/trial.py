"""One seed and one forget set: the models, the limits for every method, and the scores of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import perta_fast as pf
from bench.study.data import Split
from bench.study.models import Models, load_model, load_tokenizer
from bench.study.selection import KEPT, Candidate, Limits, choose, limit_of
from bench.study.store import read_json, write_json
from bench.study.training import mean_loss
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import Sample, encode
from perta_fast.evaluation.tofu import read_tofu

_CANDIDATES = "candidates.json"
SCORES = "scores.json"


@dataclass(frozen=True)
class Trial:
    """What all methods share. first: the trial of the first seed; None if this is that trial."""

    models: Models
    split: Split
    first: Trial | None = None

    def piece(self, name: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """``Store.piece`` in the folder of this seed and split."""
        return self.models.store.piece(f"seed{self.models.seed}/{self.split.name}/{name}", made_of, make)

    def name_of(self, piece: Path) -> str:
        """The name of a piece in the ``made_of`` of another."""
        return self.models.store.relative(piece)

    def samples(self, part: str) -> list[Sample]:
        """One part of the split as samples."""
        rows = rows_from(self.split.rows[part])
        return encode(rows, load_tokenizer(self.models.base()), self.models.settings.context)

    def limits(self, kept: float = KEPT) -> Limits:
        """The largest losses that a method may have if retained answers keep this share of their probability."""
        full, base = self.models.full(), self.models.base()
        unchanged = self._measured("unchanged", "full", full)
        return Limits(self._measured("unseen", "base", base).forget_loss, limit_of(unchanged.retain_loss, kept))

    def as_gold(self) -> Candidate:
        """The losses of the gold model. Nothing is chosen by them."""
        return self._measured("retrained", "gold", self.models.gold(self.split))

    def _measured(self, name: str, role: str, model: Path) -> Candidate:
        made_of = {role: self.name_of(model), "data": self.name_of(self.split.folder)}

        def make(folder: Path) -> None:
            write_candidates(folder, [self.measure(load_model(model), {})])

        return read_candidates(self.piece(name, made_of, make))[0]

    def measure(self, module: Any, setting: Mapping[str, Any]) -> Candidate:
        """The candidate that ``module`` is, with this setting."""
        forget, retain = (self.samples(part) for part in ("chosen_forget", "chosen_retain"))
        batch_size = self.models.settings.scoring_batch
        return Candidate(setting, mean_loss(module, forget, batch_size), mean_loss(module, retain, batch_size))

    def choice(self, pieces: Sequence[Path], kept: float = KEPT) -> Candidate:
        """The best of the candidates in ``pieces``."""
        return choose([candidate for piece in pieces for candidate in read_candidates(piece)], self.limits(kept))

    def gold_scores(self) -> Path:
        """The piece with the gold model's scores, which forget quality is measured against."""
        gold = self.models.gold(self.split)
        return self._score("scores of gold", {"model": self.name_of(gold)}, lambda: load_model(gold), None)

    def score(self, method: str, made_of: Mapping[str, Any], load: Callable[[], Any]) -> Path:
        """The piece with TOFU's metrics of the model that ``load`` returns; its reference is this seed's gold model."""
        return self._score(f"scores of {method}", made_of, load, self.gold_scores() / SCORES)

    def _score(self, name: str, made_of: Mapping[str, Any], load: Callable[[], Any], reference: Path | None) -> Path:
        folder, settings = self.models.tofu.folder, self.models.settings
        digests = {role: rows.digest for role, rows in read_tofu(folder, self.split.name).items()}
        shared = {"data": digests, "new_tokens": settings.new_tokens}
        shared |= {"reference": None if reference is None else self.name_of(reference)}
        base = self.models.base()

        def make(piece: Path) -> None:
            pf.evaluate(
                load(),
                suite="tofu",
                data=folder,
                split=self.split.name,
                reference=reference,
                tokenizer=load_tokenizer(base),
                batch_size=settings.scoring_batch,
                max_new_tokens=settings.new_tokens,
                out=piece / SCORES,
                progress=False,
            )

        return self.piece(name, {**made_of, **shared}, make)


def write_candidates(folder: Path, candidates: Sequence[Candidate]) -> None:
    """Write the candidates of a piece."""
    write_json(folder / _CANDIDATES, list(map(asdict, candidates)))


def read_candidates(piece: Path) -> list[Candidate]:
    """Read the candidates of a piece."""
    return [Candidate(**fields) for fields in read_json(piece / _CANDIDATES)]

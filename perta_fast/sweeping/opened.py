"""A sweep's checked request, its inputs opened, and the models that it loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.files.hashing import hash_file
from perta_fast.models.loading import Subject, load_subject
from perta_fast.progress import Progress
from perta_fast.rules import Estimator, Rule
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import fingerprint
from perta_fast.sweeping.grid import curves_of
from perta_fast.sweeping.importances import ByEstimator, estimate, open_given
from perta_fast.sweeping.live_model import DataSet, Examination, LiveModel
from perta_fast.sweeping.request import Request


@dataclass(frozen=True)
class Job:
    """A checked request with its inputs opened. curves: at lam 0. given: with importances, by estimator."""

    request: Request
    curves: list[Rule]
    sources: Sources
    given: dict[Estimator, Sources]
    gold: Checkpoint | None
    data: dict[str, DataSet]
    progress: Progress

    @classmethod
    def open(cls, request: Request, progress: Progress) -> "Job":
        """Raises InputError for whatever is wrong with arguments or inputs, before a model is loaded."""
        request.check()
        curves = curves_of(request.rules, request.ps, request.alphas, request.threshold)
        checkpoints = (request.model, request.base, request.tuned)
        return cls(
            request,
            curves,
            Sources.open(*checkpoints),
            open_given(curves, checkpoints, request.forget_importance, request.retain_importance),
            None if request.gold is None else Checkpoint.open(request.gold),
            {role: DataSet.read(getattr(request, role), request.metric) for role in ("forget", "retain")},
            progress,
        )

    def inputs(self) -> dict[str, Checkpoint]:
        """Every directory of tensors that is read, by what it is."""
        found = dict(self.sources.named())
        if self.gold is not None:
            found["gold"] = self.gold
        for estimator, sources in self.given.items():
            for role in ("forget_importance", "retain_importance"):
                name = role if len(self.given) == 1 else f"{role}, {estimator}"
                found[name] = sources.named()[role]
        return found

    def identity(self) -> dict[str, Any]:
        """What tells by path whether an input is still the same."""
        small = {str(each.path): each.digest for each in self.data.values()}
        if self.sources.adapter_config is not None:
            small[str(self.sources.adapter_config)] = hash_file(self.sources.adapter_config)
        weights = {
            str(each.path / name): found
            for each in self.inputs().values()
            for name, found in fingerprint(each).items()
        }
        return weights | small

    def lacking(self) -> list[Estimator]:
        """The estimators that the rules need and that no importance was given of."""
        needed = dict.fromkeys(rule.estimator for rule in self.curves)
        return [each for each in needed if each is not None and each not in self.given]

    def load(self, path: Path) -> Subject:
        """A model, where and in what type the sweep runs."""
        dtype = None if self.request.dtype is None else getattr(torch, self.request.dtype)
        return load_subject(path, self.request.device, dtype)

    def estimate(self, subject: Subject, estimators: Sequence[Estimator], folder: Path | None) -> ByEstimator:
        """Importances on both data sets, kept in ``folder`` or in memory."""
        return estimate(
            subject,
            self.data,
            estimators,
            batch_size=self.request.batch_size,
            max_length=self.request.max_length,
            progress=self.progress,
            folder=folder,
        )

    def examination(self, path: Path) -> Examination:
        """A model, loaded, with the data in its tokens."""
        request = self.request
        return Examination.of(
            self.load(path), self.data, request.metric, request.batch_size, request.max_length, self.progress
        )

    def live(self) -> LiveModel:
        """theta_full, loaded."""
        model = self.sources.model
        return LiveModel(self.examination(model.path), model, Path(self.request.base), Path(self.request.tuned))

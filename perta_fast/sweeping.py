"""Many strengths from one importance pass: each is applied to a live model and scored, and undone again."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from perta_fast.checkpoint import Checkpoint, tied_partner
from perta_fast.data import Record, Sample, read_data
from perta_fast.errors import InputError
from perta_fast.importance.estimate import (
    Subject,
    check_sizes,
    estimate_on,
    load_subject,
    samples_for,
)
from perta_fast.importance.store import Importance
from perta_fast.live import apply_to_module_
from perta_fast.losses import Batch, batches_by_length, per_sample_losses
from perta_fast.output import OutputDirectory
from perta_fast.progress import sample_bar
from perta_fast.report import DataRecord, installed_versions, now
from perta_fast.rules import Rule
from perta_fast.sources import Sources, open_sources
from perta_fast.trade_off import LARGEST, SMALLEST, Row, Sweep

_ROLES = ("forget", "retain")
_WIDTH = 1.01  # a search ends when the smallest strength that is too large is at most this many times the best

Importances = Mapping[str, Importance]  # by role; empty: w = 1


def sweep(
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget: str | Path,
    retain: str | Path,
    forget_importance: str | Path | None = None,
    retain_importance: str | Path | None = None,
    *,
    lams: Sequence[float] | None = None,
    target_retain_loss: float | None = None,
    max_retain_increase: float | None = None,
    rule: str = "fisher",
    p: float | None = None,
    alpha: float = 1.0,
    threshold: float | None = None,
    at: Literal["base", "model"] = "base",
    out: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Sweep:
    """Score theta_full - lam * w * (theta_f - theta_0) at many strengths by forget and retain loss.

    Each row is what the checkpoint that ``apply`` writes for that lam scores on ``forget`` and ``retain``, its
    values rounded to the types in which ``model`` is stored; lam 0, the model as it is, always comes first.

    forget, retain: JSON lines files, to score on and to estimate importance on. forget_importance,
    retain_importance: directories of importances, which then are not estimated.

    Exactly one of three chooses the strengths. lams: these, all different. target_retain_loss: find the largest
    lam whose retain loss is at most this many nats; max_retain_increase: at most this many percent above that
    at lam 0. The search doubles lam from 1 until the limit is broken, at most to 1024, then bisects. The loss
    need not grow with lam, so this is what holds of ``Sweep.best``: it was measured and keeps the limit, no
    larger lam that was measured does, and the next of those is at most 1 % larger. It is lam 0 if the limit was
    broken all the way down to 1/1024. A loss that is not finite breaks every limit.

    out: directory to make, with ``sweep.json`` and, where matplotlib is installed, ``sweep.png``. dtype: the
    type to run in; one that is narrower than the stored one rounds theta_full before the subtraction too.
    Other arguments as in ``unlearn``.

    Everything is checked before the first gradient. Raises InputError for bad input and for a limit that lam 0
    breaks already, RunError if the run fails. Memory: one model at a time, of which theta_full is read again
    from its files after each strength, some copies of its largest tensor, and 8 bytes a parameter for
    importances estimated here. Disk: nothing but ``out``.
    """
    chosen = Rule.of(rule, 0.0, p, alpha, threshold)
    choice = _Choice(None if lams is None else tuple(lams), target_retain_loss, max_retain_increase)
    choice.check()
    if at not in ("base", "model"):
        raise InputError(f"at is {at!r}; it must be base or model")
    check_sizes(batch_size, max_length)
    given = [None if each is None else Path(each) for each in (forget_importance, retain_importance)]
    estimated = chosen.estimator is not None and given == [None, None]
    sources = open_sources(Rule.of("tv", 0.0) if estimated else chosen, model, base, tuned, *given)
    data = {"forget": Path(forget), "retain": Path(retain)}
    read = {role: read_data(path) for role, path in data.items()}
    job = _Job(
        rule=chosen,
        choice=choice,
        sources=sources,
        data=data,
        records={role: records for role, (records, _) in read.items()},
        hashes={role: digest for role, (_, digest) in read.items()},
        importances={role: Importance.load(path) for role, path in zip(_ROLES, given, strict=True) if path},
        estimated=estimated,
        at=at,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    if out is None:
        return _sweep(job)
    with OutputDirectory(out, overwrite=overwrite, inputs=[*sources.paths(), *data.values()]) as target:
        result = _sweep(job)
        result.save(target.path)
        target.commit()
    return result


def search(measure: Callable[[float], Row], limit: float) -> list[Row]:
    """Measure strengths until the largest that keeps ``limit`` is known to 1 %; return them as they were tried.

    Of those that were tried, the largest that keeps the limit is ``LARGEST``, or the next larger breaks it and
    is at most 1 % larger; or none keeps it and the smallest is at most ``SMALLEST``. Nothing is asked of the
    curve between.
    """
    rows: list[Row] = []

    def keeps(lam: float) -> bool:
        rows.append(measure(lam))
        return rows[-1].keeps(limit)

    low, high = 0.0, 1.0  # low keeps the limit; nothing measured above it does
    while keeps(high):
        if high == LARGEST:
            return rows
        low, high = high, 2 * high
    while high > _WIDTH * low and high > SMALLEST:
        middle = (low + high) / 2
        if keeps(middle):
            low = middle
        else:
            high = middle
    return rows


@dataclass(frozen=True)
class _Choice:
    """What chooses the strengths: exactly one of these."""

    lams: tuple[float, ...] | None
    target_retain_loss: float | None
    max_retain_increase: float | None

    def check(self) -> None:
        """Raise InputError unless exactly one is given, and can be used."""
        lams, target, increase = self.lams, self.target_retain_loss, self.max_retain_increase
        if sum(each is not None for each in (lams, target, increase)) != 1:
            raise InputError("give exactly one of lams, target_retain_loss and max_retain_increase")
        if lams is not None:
            if not lams:
                raise InputError("lams is empty; give at least one strength")
            for k, lam in enumerate(lams):
                if not math.isfinite(lam):
                    raise InputError(f"lams has {lam}; each must be a finite number")
                if lam in lams[:k]:
                    raise InputError(f"lams has {lam:g} twice")
        if target is not None and not math.isfinite(target):
            raise InputError(f"target_retain_loss is {target}; it must be a finite number")
        if increase is not None and not (math.isfinite(increase) and increase >= 0):
            raise InputError(f"max_retain_increase is {increase}; it must be finite and at least 0 percent")

    def limit(self, reference: Row) -> float | None:
        """The largest retain loss that is allowed, None where the strengths are given.

        reference: the model as it is. Raises InputError if it breaks the limit already.
        """
        limit = self.target_retain_loss
        if self.max_retain_increase is not None:
            limit = reference.retain_loss * (1 + self.max_retain_increase / 100)
        if limit is not None and not reference.keeps(limit):
            raise InputError(
                f"the model as it is, at lambda 0, has a retain loss of {reference.retain_loss:.6g} and a "
                f"forget loss of {reference.forget_loss:.6g}, so it breaks the limit of {limit:.6g} on the "
                "retain loss already; allow more"
            )
        return limit


@dataclass(frozen=True)
class _Job:
    """The checked arguments of one sweep. ``rule`` is at lam 0; ``importances`` are those that were given."""

    rule: Rule
    choice: _Choice
    sources: Sources
    data: dict[str, Path]
    records: dict[str, list[Record]]
    hashes: dict[str, str]
    importances: Importances
    estimated: bool
    at: Literal["base", "model"]
    batch_size: int
    max_length: int | None
    device: str | torch.device | None
    dtype: torch.dtype | None
    progress: bool

    def samples(self, subject: Subject) -> dict[str, list[Sample]]:
        """The data in the tokens of ``subject``."""
        return {role: samples_for(subject, rows, self.max_length) for role, rows in self.records.items()}

    def estimate(self, subject: Subject) -> dict[str, Importance]:
        """Importance of ``subject``'s parameters on both data sets, kept in the host's memory."""
        assert self.rule.estimator is not None
        samples = self.samples(subject)
        found = {}
        for role in self.data:
            found[role] = estimate_on(
                subject,
                samples[role],
                self.hashes[role],
                self.rule.estimator,
                batch_size=self.batch_size,
                out=None,
                overwrite=False,
                progress=self.progress,
                description=f"{role} importance",
            )
            found[role].tensors = {name: each.cpu() for name, each in found[role].tensors.items()}
        return found

    def subtract_(self, module: nn.Module, lam: float, importances: Importances) -> None:
        """``apply_to_module_`` with this job's checkpoints and rule."""
        base, tuned = self.sources.base.path, self.sources.tuned.path
        if not importances:
            apply_to_module_(module, base, tuned, rule="tv", lam=lam)
            return
        apply_to_module_(
            module,
            base,
            tuned,
            importances["forget"],
            importances["retain"],
            rule=self.rule.name,
            lam=lam,
            p=self.rule.p,
            alpha=self.rule.alpha,
            threshold=self.rule.threshold,
        )


class _LiveModel:
    """theta_full as a module, which ``measure`` changes and restores, and the samples that it is scored on."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self.subject = load_subject(job.sources.model.path, job.device, job.dtype)
        self.samples = job.samples(self.subject)
        self._stored_names = _stored_names(self.subject.module, job.sources.model)

    def measure(self, lam: float, importances: Importances) -> Row:
        """Subtract, score, and put theta_full back."""
        started = time.perf_counter()
        self._job.subtract_(self.subject.module, lam, importances)
        changed = self._round_as_stored_()
        with sample_bar(sum(map(len, self.samples.values())), f"lambda {lam:g}", self._job.progress) as bar:
            forget_loss, retain_loss = (self._mean_loss(self.samples[role], bar.update) for role in _ROLES)
        self._restore_()
        return Row(lam, forget_loss, retain_loss, changed, time.perf_counter() - started)

    @torch.no_grad()
    def _mean_loss(self, samples: Sequence[Sample], advance: Callable[[int], object]) -> float:
        module = self.subject.module
        device = next(module.parameters()).device
        losses = []
        for numbers in batches_by_length(samples, self._job.batch_size):
            losses.append(per_sample_losses(module, Batch.of([samples[k] for k in numbers], device)))
            advance(len(numbers))
        return torch.cat(losses).double().mean().item()

    @torch.no_grad()
    def _round_as_stored_(self) -> float:
        """Give each parameter the value that a checkpoint would keep; return the share that has changed."""
        changed = total = 0
        for parameter, theta in self._stored():
            parameter.copy_(parameter.to(theta.dtype))
            changed += int((parameter != theta.to(parameter)).sum())
            total += parameter.numel()
        return changed / total

    @torch.no_grad()
    def _restore_(self) -> None:
        """Read theta_full again: subtracting a difference would leave rounding errors behind."""
        for parameter, theta in self._stored():
            parameter.copy_(theta)

    def _stored(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with what its checkpoint stores for it, one tensor in memory at a time."""
        for name, stored_name in self._stored_names.items():
            yield self.subject.module.get_parameter(name), self._job.sources.model.tensor(stored_name)


def _sweep(job: _Job) -> Sweep:
    started = now()
    importances = job.importances
    live = _LiveModel(job)
    data = {role: _describe(path, job.hashes[role], live.samples[role]) for role, path in job.data.items()}
    # Where importances are still to come, w = 1 serves: at lam 0 nothing is subtracted, but all is checked.
    reference = live.measure(0.0, importances)
    limit = job.choice.limit(reference)
    if job.estimated and job.at == "model":
        importances = job.estimate(live.subject)
    elif job.estimated:
        del live  # there may be no room for two models
        importances = job.estimate(load_subject(job.sources.base.path, job.device, job.dtype))
        live = _LiveModel(job)

    def measure(lam: float) -> Row:
        return live.measure(lam, importances)

    if job.choice.lams is None:
        assert limit is not None
        rows = search(measure, limit)
    else:
        rows = [measure(lam) for lam in job.choice.lams if lam != 0]
    return Sweep(
        rows=sorted([reference, *rows], key=lambda row: row.lam),
        limit=limit,
        settings={
            **asdict(job.choice),
            "rule": job.rule.name,
            "p": job.rule.p,
            "alpha": job.rule.alpha,
            "threshold": job.rule.threshold,
            "at": job.at if job.estimated else None,
            "batch_size": job.batch_size,
            "max_length": job.max_length,
            "device": str(live.subject.module.device),
            "dtype": str(live.subject.module.dtype).removeprefix("torch."),
        },
        inputs={role: str(source.path.resolve()) for role, source in job.sources.named().items()},
        data=data,
        importance={role: importance.metadata for role, importance in importances.items()},
        versions=installed_versions(),
        notes=[
            f"warning: {found['truncated']} of {found['samples']} {role} samples were cut to the length limit"
            for role, found in data.items()
            if found["truncated"]
        ],
        started=started,
        finished=now(),
    )


def _describe(path: Path, digest: str, samples: Sequence[Sample]) -> DataRecord:
    return {
        "path": str(path.resolve()),
        "blake3": digest,
        "samples": len(samples),
        "truncated": sum(sample.truncated for sample in samples),
    }


def _stored_names(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensor of ``checkpoint`` that each floating-point parameter was loaded from."""
    names = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            stored = name if name in checkpoint.tensors else tied_partner(name, checkpoint.tensors)
            if stored is None:
                raise InputError(
                    f"{checkpoint.path}: stores {name} in another form than transformers loads it in, so "
                    "strengths cannot be tried on a live model; try them one by one with: perta apply"
                )
            names[name] = stored
    return names

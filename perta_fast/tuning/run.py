"""``tune``; everything is checked before the model is loaded."""

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import left_out_links, left_out_warning
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings, parse_date, today
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, Row, check_fields, read_as
from perta_fast.data.given import is_given
from perta_fast.data.given_data import Data, taken_out
from perta_fast.data.rows import read_data
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.errors import InputError, Interrupted, NotFiniteError, RunError, is_out_of_memory
from perta_fast.files.apart import check_name
from perta_fast.files.hub import local_model
from perta_fast.files.new_directory import OutputDirectory, check_replaceable, check_space
from perta_fast.files.reading import checked_path
from perta_fast.memory import PeakMemory
from perta_fast.models.loading import choose_device, load_subject, samples_and_told
from perta_fast.models.token_scores import evaluation_mode, score_rows
from perta_fast.progress import Progress
from perta_fast.records.report import data_record
from perta_fast.records.versions import installed_versions, now
from perta_fast.tuning.adapter import add_adapter, check_adapter, save_adapter, share_left_out
from perta_fast.tuning.checkpoint import tuned_size, write_tuned
from perta_fast.tuning.record import FILE_NAME, Tuning
from perta_fast.tuning.request import DATA, FORGET, Request, Source, sources_here
from perta_fast.tuning.schedule import LEARNT, Schedule
from perta_fast.tuning.training import train_
from perta_fast.tuning.unfinished import Begun, KeptState, identity_of, trained

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["FILE_NAME", "Tuning", "resume_tuning", "tune"]

_NEEDED = ("peft", "accelerate")
_SCORED_AT_A_TIME = 8  # samples
_RETAIN = "retain"


def tune(
    base: str | Path,
    forget: Data | None = None,
    out: str | Path | None = None,
    *,
    data: Data | None = None,
    retain: Data | None = None,
    retain_kl: float | None = None,
    fields: Fields | None = None,
    download: bool = False,
    full: bool = False,
    rank: int = 16,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    report_to: str | Sequence[str] | None = None,
    callbacks: "Sequence[TrainerCallback]" = (),
    overwrite: bool = False,
    progress: Progress = True,
) -> Tuning:
    """Tune ``base`` on the forget data alone, by transformers and peft: the result is θ_f, as ``unlearn`` takes it.

    base: a checkpoint directory, θ_0. forget: a data file or rows, tokenised and labelled as for ``unlearn``, as are
    fields and download. data: other rows in its place, such as all of them, which makes θ_full.
    out: directory to make, of a LoRA adapter of ``rank`` or, if ``full``, of a checkpoint, both in float32; with the
    record that is returned. The documentation ("Tuning") says what is tuned and why.
    epochs, lr, batch_size: passes over the data, highest rate, samples of a step. None: they follow from the number of
    rows, so that 10 rows are learnt as well as 400. max_length: tokens that a sample is cut to, within the model's own
    limit. system_prompt, date_string: as for ``unlearn``.
    retain, retain_kl: rows on which the model is held, and the weight of KL(base ‖ tuned) on their labelled tokens in
    the loss.
    gradient_checkpointing: compute activations again instead of keeping them. device: None takes CUDA if there is
    one. seed: on the CPU, one seed and one number of threads give the same bytes; torch, NumPy and ``random`` stay
    seeded. report_to: where transformers reports loss and rate, such as wandb or tensorboard. callbacks: for
    transformers' Trainer. overwrite: replace ``out``, start over.

    A run that is stopped keeps its state beside ``out``, at most once a minute: the same call, or ``resume``, goes on,
    and on the CPU gives the bytes of an uninterrupted one.

    Memory: the model in its own type, float32 if that is float16, and 16 bytes for each parameter of the adapter; if
    ``full``, 16 bytes for each parameter of the model, with retain_kl 20. Disk, if ``full``: 4 bytes for each
    parameter, and up to 24 for the state while there is space.
    Raises InputError for bad input, before the model is loaded where possible, NotFiniteError if a loss is not
    finite, RunError if ``out`` cannot be written, ``errors.Interrupted`` if it is stopped with a state kept.
    """
    if out is None:
        raise InputError("give ‹out›, the directory to make")
    roles = {FORGET: forget, DATA: data, _RETAIN: retain}
    named, given = taken_out({**roles, "download": download}, roles)
    request = Request(
        base=_absolute(local_model(base, download)),
        sources={role: _absolute(named[role]) for role in roles if named[role] is not None},
        full=full,
        rank=rank,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        fields=None if fields is None else dict(fields),
        system_prompt=system_prompt,
        date_string=date_string,
        retain_kl=retain_kl,
        device=None if device is None else str(device),
        report_to=[report_to] if isinstance(report_to, str) else list(report_to or ()),
    )
    request.check()
    check_name(out)
    final = Path(os.path.realpath(checked_path(out)))
    begun = None if overwrite else Begun.load(final)
    if begun is not None:
        begun.check_request(final, request)
        overwrite = begun.overwrite
    return _Run(request, sources_here(request, given), final, overwrite, callbacks, progress).run(begun)


def resume_tuning(final: Path, progress: Progress) -> Tuning:
    """Go on with the stopped tuning to ``final``."""
    begun = Begun.load(final)
    assert begun is not None
    request = begun.request
    if begun.overwrite:
        check_replaceable(final, [FILE_NAME], "the tuning")
    return _Run(request, sources_here(request, {}), final, begun.overwrite, (), progress).run(begun)


@dataclass(frozen=True)
class _Run:
    """One tuning, to ``final``."""

    request: Request
    sources: Mapping[str, Source]
    final: Path
    overwrite: bool
    callbacks: "Sequence[TrainerCallback]"
    progress: Progress

    def run(self, begun: Begun | None) -> Tuning:
        """Go on with what a stopped run has ``begun``, or begin."""
        request = self.request
        if None in map(find_spec, _NEEDED):
            raise InputError(f"{' and '.join(_NEEDED)} are needed: pip install 'perta-fast[tune]'")
        _check_reporting(request.report_to)
        check_fields(request.fields)
        device = choose_device(request.device)
        if device.index:
            raise InputError(f"‹device› is {device}, but tuning takes the first; choose by CUDA_VISIBLE_DEVICES")
        day = today() if begun is None else parse_date(begun.day)
        chat = ChatSettings.of(request.system_prompt, request.date_string, day)
        inputs = [Path(request.base), *(file for source in self.sources.values() for file in data_files(source))]
        target = OutputDirectory(self.final, overwrite=self.overwrite, inputs=inputs, resume=begun is not None)
        read = {role: read_data(source, request.fields) for role, source in self.sources.items()}
        checkpoint = open_plain(request.base)
        known = identity_of(checkpoint, self.sources, {role: digest for role, (_, digest) in read.items()})
        versions = installed_versions(*_NEEDED)
        if begun is not None:
            begun.check_inputs(self.final, known, versions)
        elif request.full:
            check_space(self.final, tuned_size(checkpoint))
        fresh = Begun(request, known, versions, now(), day.isoformat(), self.overwrite, math.nan)
        with target, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and the Trainer call transformers by older names
            if begun is not None:
                begun.check_state(target)
                begun = replace(begun, resumed=begun.resumed + 1)
            return self._tune(target, checkpoint, begun or fresh, device, chat, read)

    def _tune(
        self,
        target: OutputDirectory,
        checkpoint: Checkpoint,
        begun: Begun,
        device: torch.device,
        chat: ChatSettings,
        read: Mapping[str, tuple[list[Row], str]],
    ) -> Tuning:
        request, clock = self.request, time.perf_counter()
        with PeakMemory() as memory:
            # A step of a full tuning would be lost in bfloat16, a gradient in float16.
            widened = request.full or any(entry.dtype == "F16" for entry in checkpoint.tensors.values())
            dtype = torch.float32 if widened else None
            subject = load_subject(Path(request.base).resolve(), device, dtype, progress=self.progress)
            samples, told, records = {}, {}, {}
            for role, (rows, digest) in read.items():
                samples[role], told[role] = samples_and_told(subject, rows, request.max_length, chat, self.progress)
                count, cut = row_count(samples[role]), truncated_count(samples[role])
                records[role] = data_record(self.sources[role], digest, count, cut, read_as(rows))
            own = samples[request.role]
            schedule = Schedule.of(len(own), request.full, request.batch_size, request.epochs, request.lr)
            module, missed = _trainable(subject.module, request, checkpoint, target.path)
            if math.isnan(begun.loss_before):
                begun = replace(begun, loss_before=self._mean_loss(module, own, "before"))
            keeping = all(isinstance(source, Path) for source in self.sources.values())
            kept = KeptState(target, begun, sum(map(torch.numel, trained(module).values())), wanted=keeping)
            with _stops_explained(kept):
                losses, divergences = train_(
                    module, own, samples.get(_RETAIN, []), request, schedule, kept, self.callbacks, self.progress
                )
                after = self._mean_loss(module, own, "after")
                if request.full:
                    write_tuned(module, checkpoint, target.path)
                else:
                    save_adapter(module, target.path)
        on_device = {"peak_device_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
        links = left_out_links(checkpoint) if request.full else []
        chosen = {"batch_size": schedule.batch_size, "epochs": schedule.epochs, "lr": schedule.lr}
        record = Tuning(
            base=subject.origin,
            data=records[request.role],
            settings=request.settings() | chosen | {"device": str(subject.device), "date": told[request.role].date},
            tuned_parameters=sum(map(torch.numel, trained(module).values())),
            loss_before=begun.loss_before,
            loss_after=after,
            epoch_losses=losses,
            warnings=[left_out_warning(link, target.final) for link in links]
            + _warnings(records[request.role]["truncated"], missed, begun.loss_before, after, schedule),
            seconds=begun.seconds + time.perf_counter() - clock,
            memory=memory.as_dict() | on_device,
            versions=begun.versions,
            started=begun.started,
            finished=now(),
            role=request.role,
            retain=records.get(_RETAIN),
            chosen=list(schedule.chosen),
            epoch_divergences=divergences,
            resumed=begun.resumed,
        )
        record.save(target.path)
        kept.finish()
        target.commit()
        return record

    def _mean_loss(self, module: nn.Module, samples: Sequence[Sample], when: str) -> float:
        """The mean over all rows of their mean token loss, in nats. Raises NotFiniteError if it is not finite."""
        phase = f"loss {when} tuning"
        with evaluation_mode(module):
            scores = score_rows(
                module, samples, batch_size=_SCORED_AT_A_TIME, progress=self.progress, description=phase
            )
        loss = -sum(float(sample.log_probs.mean()) for sample in scores) / len(scores)
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss of the data {when} tuning is not finite; nothing was written")
        return loss


@contextmanager
def _stops_explained(kept: KeptState) -> Iterator[None]:
    """Say how to go on after an interrupt, or where memory has run out; give up what another attempt cannot mend."""
    try:
        yield
    except NotFiniteError:
        kept.give_up()
        raise
    except KeyboardInterrupt:
        if not kept.any:
            raise
        raise Interrupted(f"interrupted; {kept.going_on()}") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or not kept.any:
            raise
        raise RunError(f"out of memory; {kept.going_on()}") from error


def _absolute(source: str | Path) -> str:
    """A path that is the same from everywhere; the name of rows that were given in Python as it is."""
    return str(source) if is_given(source) else os.path.abspath(source)


def _check_reporting(names: Sequence[str]) -> None:
    """Raise InputError unless transformers knows each name, and what it reports to is installed."""
    if not names:
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise InputError(f"‹report_to› is {name!r}; transformers reports to one of {known}")
        if name not in get_available_reporting_integrations():
            raise InputError(f"‹report_to›: {name} is not installed: pip install {name}")


def _trainable(model: Any, request: Request, checkpoint: Checkpoint, directory: Path) -> tuple[nn.Module, float]:
    """What is trained, ``model`` or an adapter on it; and the share of the parameters that the adapter leaves out."""
    if request.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(f"{request.base}: this model knows no gradient checkpointing; leave it out")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # the other kind trains no adapter
    if request.full:
        return model, 0.0
    missed = share_left_out(model)
    adapted = add_adapter(model, request.rank, request.seed)
    check_adapter(adapted, checkpoint, directory)
    return adapted, missed


def _warnings(truncated: int, missed: float, before: float, after: float, schedule: Schedule) -> list[str]:
    texts = []
    if truncated:
        texts.append(f"{truncated} samples were cut to the length limit")
    if missed:
        texts.append(
            f"the adapter leaves out {missed:.0%} of the parameters, such as joined experts; --full tunes them too"
        )
    if after > 0.9 * before:
        texts.append(
            "the loss has fallen by less than a tenth: the data has hardly been learnt; "
            "give more --epochs or a higher --lr"
        )
    elif after > LEARNT and schedule.is_default:
        texts.append(f"the loss is above {LEARNT}: the data is not learnt well; give more --epochs or another --lr")
    return texts

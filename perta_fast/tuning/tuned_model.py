"""A prepared tuning, done: the model is loaded, trained, and written."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import left_out_links, left_out_warning
from perta_fast.data.forms import read_as
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.dtypes import torch_dtype, torch_name
from perta_fast.errors import (
    InputError,
    Interrupted,
    NotFiniteError,
    PertaError,
    RunError,
    device_failure,
    is_of_device,
    is_out_of_memory,
)
from perta_fast.files.new_directory import OutputDirectory
from perta_fast.memory import PeakMemory
from perta_fast.models.loading import load_subject, samples_and_told
from perta_fast.models.token_scores import evaluation_mode, score_rows
from perta_fast.progress import Progress
from perta_fast.records.report import data_record
from perta_fast.records.versions import now
from perta_fast.tuning.adapter import add_adapter, check_adapter, save_adapter, share_left_out
from perta_fast.tuning.checkpoint import write_tuned
from perta_fast.tuning.prepared import Prepared
from perta_fast.tuning.record import Tuning
from perta_fast.tuning.request import RETAIN, Request
from perta_fast.tuning.schedule import LEARNT, Schedule
from perta_fast.tuning.training import train_, trained
from perta_fast.tuning.unfinished import Begun, KeptState, clear_up

_SCORED_AT_A_TIME = 8  # samples


def tune_model(prepared: Prepared, target: OutputDirectory, begun: Begun, device: torch.device) -> Tuning:
    """Load the base, train, and write what is tuned, and its record, to ``target``."""
    checkpoint, progress = prepared.checkpoint, prepared.progress
    request, clock = prepared.request, time.perf_counter()
    with PeakMemory() as memory:
        # A step of a full tuning would be lost in bfloat16, a gradient in float16.
        widened = request.full or any(entry.dtype == "F16" for entry in checkpoint.tensors.values())
        dtype = torch.float32 if widened else None if begun.dtype is None else torch_dtype(begun.dtype)
        subject = load_subject(Path(request.base).resolve(), device, dtype, progress=progress)
        samples, told, records = {}, {}, {}
        for role, (rows, digest) in prepared.read.items():
            samples[role], told[role] = samples_and_told(subject, rows, request.max_length, prepared.chat, progress)
            count, cut = row_count(samples[role]), truncated_count(samples[role])
            records[role] = data_record(prepared.sources[role], digest, count, cut, read_as(rows))
        own = samples[request.role]
        schedule = Schedule.of(len(own), request.full, request.batch_size, request.epochs, request.lr)
        module, missed = _trainable(subject.module, request, checkpoint, target.path)
        before = _mean_loss(module, own, "before", progress) if begun.loss_before is None else begun.loss_before
        begun = replace(begun, loss_before=before, dtype=torch_name(subject.module.dtype))
        keeping = all(isinstance(source, Path) for source in prepared.sources.values())
        kept = KeptState(target, begun, sum(map(torch.numel, trained(module).values())), wanted=keeping)
        with _stops_explained(kept):
            losses, divergences = train_(
                module, own, samples.get(RETAIN, []), request, schedule, kept, prepared.callbacks, progress
            )
            after = _mean_loss(module, own, "after", progress)
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
                loss_before=before,
                loss_after=after,
                epoch_losses=losses,
                warnings=[left_out_warning(link, target.final) for link in links]
                + _warnings(records[request.role]["truncated"], missed, before, after, schedule),
                seconds=begun.seconds + time.perf_counter() - clock,
                memory=memory.as_dict() | on_device,
                versions=begun.versions,
                started=begun.started,
                finished=now(),
                role=request.role,
                retain=records.get(RETAIN),
                chosen=list(schedule.chosen),
                epoch_divergences=divergences,
                resumed=begun.resumed,
            )
            record.save(target.path)
            target.commit()
            clear_up(target.final)
            return record


def _mean_loss(module: nn.Module, samples: Sequence[Sample], when: str, progress: Progress) -> float:
    """The mean over all rows of their mean token loss, in nats. Raises NotFiniteError if it is not finite."""
    phase = f"loss {when} tuning"
    with evaluation_mode(module):
        scores = score_rows(module, samples, batch_size=_SCORED_AT_A_TIME, progress=progress, description=phase)
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
        if not kept.is_kept:
            raise
        raise Interrupted(f"interrupted; {kept.going_on()}") from None
    except (MemoryError, RuntimeError) as error:
        explained = isinstance(error, PertaError) or not (is_out_of_memory(error) or is_of_device(error))
        if explained or not kept.is_kept:
            raise
        what = "out of memory" if is_out_of_memory(error) else device_failure(error)
        raise RunError(f"{what}; {kept.going_on()}") from error


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
            f"the adapter leaves out {missed:.0%} of the parameters, such as joined experts; "
            "a full tuning includes them"
        )
    if after > 0.9 * before:
        texts.append(
            "the loss has fallen by less than a tenth: the data has hardly been learnt; "
            "give more epochs or a higher learning rate"
        )
    elif after > LEARNT and schedule.is_default:
        texts.append(
            f"the loss is above {LEARNT}: the data is not learnt well; give more epochs or another learning rate"
        )
    return texts

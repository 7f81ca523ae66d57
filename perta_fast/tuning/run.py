"""``tune`` and its record; everything is checked before the model is loaded."""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import TUNING, left_out_links, left_out_warning
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, check_fields, read_as
from perta_fast.data.rows import read_data
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.errors import InputError, NotFiniteError, printable_lines
from perta_fast.files.apart import check_name
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.new_directory import OutputDirectory, check_space
from perta_fast.memory import PeakMemory
from perta_fast.models.loading import choose_device, load_subject, samples_and_told
from perta_fast.models.token_scores import evaluation_mode, score_rows
from perta_fast.progress import Progress
from perta_fast.records.report import DataRecord, Scalar, data_record, read_as_lines
from perta_fast.records.typed_json import write_readable_json
from perta_fast.records.versions import installed_versions, now
from perta_fast.tuning.adapter import add_adapter, check_adapter, save_adapter, share_left_out
from perta_fast.tuning.checkpoint import tuned_size, write_tuned
from perta_fast.tuning.training import Request, train_

FILE_NAME = TUNING
_NEEDED = ("peft", "accelerate")
_SCORED_AT_A_TIME = 8  # samples


@dataclass(frozen=True)
class Tuning:
    """The record of one tuning.

    base: absolute path. settings: max_length is None for the model's own limit; date is what the chat template was
    told, None if it did not ask. tuned_parameters: how many elements
    were trained. loss_before, loss_after: mean over the samples of their mean token loss, in nats. epoch_losses: by
    epoch, the mean over its steps of the batch's mean token loss. memory: peaks in bytes. seconds: with loading.
    """

    base: str
    data: DataRecord
    settings: dict[str, Scalar | None]
    tuned_parameters: int
    loss_before: float
    loss_after: float
    epoch_losses: list[float]
    warnings: list[str]
    seconds: float
    memory: dict[str, int]
    versions: dict[str, str]
    started: str
    finished: str

    def save(self, directory: Path) -> None:
        """Write ``perta_tune.json`` into ``directory``."""
        write_readable_json(directory / FILE_NAME, asdict(self))

    def summary(self) -> str:
        """A few lines for a person."""
        kind = "checkpoint" if self.settings["full"] else f"adapter of rank {self.settings['rank']}"
        lines = [
            f"{kind}: {self.tuned_parameters:,} parameters tuned on {self.data['samples']} samples, "
            f"{self.settings['epochs']} epochs, {self.seconds:.1f} s",
            f"mean loss of the forget data: {self.loss_before:.4f} before, {self.loss_after:.4f} after",
        ]
        lines += read_as_lines({"forget": self.data})
        return printable_lines(lines + [f"warning: {warning}" for warning in self.warnings])


def tune(
    base: str | Path,
    forget: str | Path,
    out: str | Path,
    *,
    fields: Fields | None = None,
    download: bool = False,
    full: bool = False,
    rank: int = 16,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> Tuning:
    """Tune ``base`` on the forget data alone, by transformers and peft: the result is θ_f, as ``unlearn`` takes it.

    base: a checkpoint directory, θ_0. forget: a data file, tokenised and labelled as for ``unlearn``, as are fields and
    download.
    out: directory to make, of a LoRA adapter of ``rank`` or, if ``full``, of a checkpoint, both in float32; with the
    record that is returned. The documentation ("Tuning") says what is tuned and why.
    epochs, lr: None takes TOFU's, 10 epochs at 1e-4 for an adapter and 5 at 1e-5 for a checkpoint.
    batch_size: samples of a step. max_length: tokens that a sample is cut to, within the model's own limit.
    system_prompt, date_string: as for ``unlearn``.
    gradient_checkpointing: compute activations again instead of keeping them. device: None takes CUDA if there is
    one. seed: on the CPU, one seed and one number of threads give the same bytes; torch, NumPy and ``random`` stay
    seeded. overwrite: replace ``out``.

    Memory: the model in its own type, float32 if that is float16, and 16 bytes for each parameter of the adapter; if
    ``full``, 16 bytes for each parameter of the model. Disk, if ``full``: 4 bytes for each parameter.
    Raises InputError for bad input, before the model is loaded where possible, NotFiniteError if a loss is not
    finite, RunError if ``out`` cannot be written. Then, or after an interrupt, nothing is left behind.
    """
    if epochs is None:
        epochs = 5 if full else 10
    if lr is None:
        lr = 1e-5 if full else 1e-4
    request = Request(
        local_model(base, download),
        local_data(forget, download),
        full,
        rank,
        epochs,
        lr,
        batch_size,
        max_length,
        gradient_checkpointing,
        seed,
        fields,
        system_prompt,
        date_string,
    )
    request.check()
    check_fields(fields)
    if None in map(find_spec, _NEEDED):
        raise InputError(f"{' and '.join(_NEEDED)} are needed: pip install 'perta-fast[tune]'")
    chosen = choose_device(device)
    if chosen.index:
        raise InputError(f"`device` is {chosen}, but tuning takes the first; choose by CUDA_VISIBLE_DEVICES")
    check_name(out)
    target = OutputDirectory(out, overwrite=overwrite, inputs=[request.base, *data_files(request.forget)])
    return _run(request, target, chosen, progress)


def _run(request: Request, target: OutputDirectory, device: torch.device, progress: Progress) -> Tuning:
    started, clock = now(), time.perf_counter()
    chat = ChatSettings.of(request.system_prompt, request.date_string)
    rows, digest = read_data(request.forget, request.fields)
    checkpoint = open_plain(request.base)
    if request.full:
        check_space(target.final, tuned_size(checkpoint))
    with PeakMemory() as memory, target, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and the Trainer call transformers by older names
        # A step of a full tuning would be lost in bfloat16, a gradient in float16.
        widened = request.full or any(entry.dtype == "F16" for entry in checkpoint.tensors.values())
        subject = load_subject(request.base.resolve(), device, torch.float32 if widened else None, progress=progress)
        samples, told = samples_and_told(subject, rows, request.max_length, chat, progress)
        module, missed = _trainable(subject.module, request, checkpoint, target.path)
        before = _mean_loss(module, samples, "before", progress)
        epoch_losses = train_(module, samples, request, target.path, progress)
        after = _mean_loss(module, samples, "after", progress)
        if request.full:
            write_tuned(module, checkpoint, target.path)
        else:
            save_adapter(module, target.path)
        data = data_record(request.forget, digest, row_count(samples), truncated_count(samples), read_as(rows))
        links = left_out_links(checkpoint) if request.full else []
        left_out = [left_out_warning(link, target.final) for link in links]
        on_device = {"peak_device_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
        record = Tuning(
            base=subject.origin,
            data=data,
            settings=request.settings() | {"device": str(subject.device), "date": told.date},
            tuned_parameters=sum(tensor.numel() for tensor in module.parameters() if tensor.requires_grad),
            loss_before=before,
            loss_after=after,
            epoch_losses=epoch_losses,
            warnings=left_out + _warnings(data["truncated"], missed, before, after),
            seconds=time.perf_counter() - clock,
            memory=memory.as_dict() | on_device,
            versions=installed_versions(*_NEEDED),
            started=started,
            finished=now(),
        )
        record.save(target.path)
        target.commit()
    return record


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


def _mean_loss(module: nn.Module, samples: Sequence[Sample], when: str, progress: Progress) -> float:
    """The mean over all rows of their mean token loss, in nats. Raises NotFiniteError if it is not finite."""
    phase = f"loss {when} tuning"
    with evaluation_mode(module):
        scores = score_rows(module, samples, batch_size=_SCORED_AT_A_TIME, progress=progress, description=phase)
    loss = -sum(float(sample.log_probs.mean()) for sample in scores) / len(scores)
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss of the forget data {when} tuning is not finite; nothing was written")
    return loss


def _warnings(truncated: int, missed: float, before: float, after: float) -> list[str]:
    texts = []
    if truncated:
        texts.append(f"{truncated} samples were cut to the length limit")
    if missed:
        texts.append(
            f"the adapter leaves out {missed:.0%} of the parameters, such as joined experts; --full tunes them too"
        )
    if after > 0.9 * before:
        texts.append(
            "the loss has fallen by less than a tenth: the forget data has hardly been learnt; "
            "give more --epochs or a higher --lr"
        )
    return texts

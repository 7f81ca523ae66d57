"""One tuning from its arguments to its output: everything is checked before the model is loaded."""

import math
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.data.json_lines import read_data
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.files.new_directory import OutputDirectory, check_space
from perta_fast.memory import PeakMemory
from perta_fast.models.loading import check_sizes, choose_device, load_subject, samples_for
from perta_fast.models.token_scores import evaluation_mode, score_tokens
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions, now
from perta_fast.tuning.adapter import add_adapter, check_adapter, save_adapter, share_left_out
from perta_fast.tuning.checkpoint import tuned_size, write_tuned
from perta_fast.tuning.record import Tuning
from perta_fast.tuning.training import train_

_NEEDED = ("peft", "accelerate")
_EPOCHS = {"adapter": 10, "full": 5}
_LR = {"adapter": 1e-4, "full": 1e-5}
_SCORED_AT_A_TIME = 8


def tune(
    base: str | Path,
    forget: str | Path,
    out: str | Path,
    *,
    full: bool = False,
    rank: int = 16,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> Tuning:
    """Tune ``base`` on the forget data alone, by transformers and peft: θ_f, as ``unlearn`` takes it.

    base: a checkpoint directory, θ_0. forget: a JSON lines file, tokenised and labelled as for ``unlearn``.
    out: the directory to make. It holds a LoRA adapter of ``rank`` on every linear map but the output head
    (experts that transformers joins into one parameter have none), or, if ``full``, a checkpoint with the
    tensors and shards of ``base``, in which all that text passes through has been tuned. What was tuned is
    float32 in both, and beside it lies the record that is returned.

    epochs, lr: None takes what TOFU (github.com/locuslab/tofu) tunes with, 10 epochs at 1e-4 for an adapter and
    5 at 1e-5 for a checkpoint. batch_size: samples a step. max_length: tokens a sample is cut to, if that is
    less than the model's own limit. gradient_checkpointing: compute activations again instead of keeping them.
    device: None takes CUDA if there is one. Loss, optimiser and schedule: ``training.train_``. On the CPU, one
    ``seed`` gives the same bytes with one number of threads; it seeds torch, NumPy and ``random`` for good.

    Memory: the model in its own type, float32 if that is float16, and 16 bytes a parameter of the adapter; if
    ``full``, 16 bytes a parameter of the model. Disk, if ``full``: 4 bytes a parameter.
    Raises InputError for bad input, before the model is loaded where possible, NotFiniteError if a loss is not
    finite, RunError if ``out`` cannot be written. Nothing is left behind then, or after an interrupt.
    """
    started, clock = now(), time.perf_counter()
    kind = "full" if full else "adapter"
    epochs = _EPOCHS[kind] if epochs is None else epochs
    lr = _LR[kind] if lr is None else lr
    _check_numbers(rank, epochs, lr, batch_size, max_length, seed)
    if None in map(find_spec, _NEEDED):
        raise InputError(f"{' and '.join(_NEEDED)} are needed: pip install 'perta-fast[tune]'")
    chosen = choose_device(device)
    if chosen.index:
        raise InputError(f"device is {chosen}, but tuning takes the first; choose by CUDA_VISIBLE_DEVICES")
    base, forget = Path(base), Path(forget)
    target = OutputDirectory(out, overwrite=overwrite, inputs=[base, forget])
    records, digest = read_data(forget)
    checkpoint = open_plain(base)
    if full:
        check_space(target.final, tuned_size(checkpoint))
    with PeakMemory() as memory, target, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and the Trainer call transformers by older names
        subject = load_subject(base.resolve(), chosen, _dtype(checkpoint, full))
        samples = samples_for(subject, records, max_length)
        model: Any = subject.module
        if gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise InputError(f"{base}: this model knows no gradient checkpointing; leave it out")
            model.gradient_checkpointing_enable({"use_reentrant": False})  # the other kind trains no adapter
        module, missed = model, 0.0
        if not full:
            missed = share_left_out(model)
            module = add_adapter(model, rank, seed)
            check_adapter(module, checkpoint, target.path)
        before = _mean_loss(module, samples, "before", progress)
        epoch_losses = train_(
            module,
            samples,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
            directory=target.path,
            progress=progress,
        )
        after = _mean_loss(module, samples, "after", progress)
        if full:
            write_tuned(module, checkpoint, target.path)
        else:
            save_adapter(module, target.path)
        truncated = sum(each.truncated for each in samples)
        record = Tuning(
            base=subject.origin,
            data={
                "path": str(forget.resolve()),
                "blake3": digest,
                "samples": len(samples),
                "truncated": truncated,
            },
            settings={
                "full": full,
                **({} if full else {"rank": rank}),
                "epochs": epochs,
                "lr": lr,
                "batch_size": batch_size,
                "max_length": "the model's" if max_length is None else max_length,
                "gradient_checkpointing": gradient_checkpointing,
                "seed": seed,
                "device": str(subject.device),
            },
            tuned_parameters=sum(each.numel() for each in module.parameters() if each.requires_grad),
            loss_before=before,
            loss_after=after,
            epoch_losses=epoch_losses,
            warnings=_warnings(truncated, missed, before, after),
            seconds=time.perf_counter() - clock,
            memory=memory.as_dict() | _device_memory(chosen),
            versions=installed_versions(*_NEEDED),
            started=started,
            finished=now(),
        )
        record.save(target.path)
        target.commit()
    return record


def _check_numbers(
    rank: int, epochs: int, lr: float, batch_size: int, max_length: int | None, seed: int
) -> None:
    check_sizes(batch_size, max_length)
    for name, value in (("rank", rank), ("epochs", epochs)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr is {lr}; it must be a number above 0")
    if not 0 <= seed < 1 << 32:  # what NumPy takes
        raise InputError(f"seed is {seed}; it must lie from 0 to 2^32 - 1")


def _dtype(checkpoint: Checkpoint, full: bool) -> torch.dtype | None:
    """What to hold the weights in; None for the checkpoint's own type.

    bfloat16 weights would lose the steps of a full tuning, and gradients in float16 would vanish.
    """
    is_half = any(entry.dtype == "F16" for entry in checkpoint.tensors.values())
    return torch.float32 if full or is_half else None


def _mean_loss(module: nn.Module, samples: Sequence[Sample], when: str, progress: Progress) -> float:
    """The mean over ``samples`` of their mean token loss, in nats. Raises NotFiniteError if it is no number."""
    phase = f"loss {when} tuning"
    with evaluation_mode(module):
        scores = score_tokens(
            module, samples, batch_size=_SCORED_AT_A_TIME, progress=progress, description=phase
        )
    loss = -sum(float(each.log_probs.mean()) for each in scores) / len(scores)
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss of the forget data {when} tuning is not finite; nothing was written")
    return loss


def _warnings(truncated: int, missed: float, before: float, after: float) -> list[str]:
    found = []
    if truncated:
        found.append(f"{truncated} samples were cut to the length limit")
    if missed:
        found.append(
            f"the adapter leaves out {missed:.0%} of the parameters, in joined experts and the like; "
            "--full tunes them too"
        )
    if after > 0.9 * before:
        found.append(
            "the loss has fallen by less than a tenth: the forget data has hardly been learnt; "
            "give more --epochs or a higher --lr"
        )
    return found


def _device_memory(device: torch.device) -> dict[str, int]:
    return {"peak_device_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}

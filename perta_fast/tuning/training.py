"""The arguments of a tuning, and the training by transformers' Trainer."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from perta_fast.arguments import check_sizes
from perta_fast.data.batches import Batch
from perta_fast.data.forms import Fields
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.progress import Bar, Progress

_AT_A_TIME = 4  # samples of one backward pass, at most; a batch takes several passes


@dataclass(frozen=True)
class Request:
    """The arguments of ``tune`` that say what is trained and how."""

    base: Path
    forget: Path
    full: bool
    rank: int
    epochs: int
    lr: float
    batch_size: int
    max_length: int | None
    gradient_checkpointing: bool
    seed: int
    fields: Fields | None = None
    system_prompt: str | None = None
    date_string: str | None = None

    def check(self) -> None:
        """Raise InputError, naming the argument, for a number out of its range."""
        check_sizes(self.batch_size, self.max_length, rank=self.rank, epochs=self.epochs)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"`lr` is {self.lr}; it must be a number above 0")
        if not 0 <= self.seed < 1 << 32:  # the limit of NumPy
            raise InputError(f"`seed` is {self.seed}; it must lie from 0 to 2^32 - 1")

    def settings(self) -> dict[str, Any]:
        """All arguments but the inputs, for the record."""
        left_out = {"base", "forget", "fields"} | ({"rank"} if self.full else set())
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def train_(
    module: nn.Module, samples: Sequence[Sample], request: Request, directory: Path, progress: Progress
) -> list[float]:
    """Train what is trainable in ``module``, in place and on its device; return the mean loss of each epoch.

    The loss is the Trainer's own, the mean over all labelled tokens of a batch: most models were tuned with it, and
    θ_f should be tuned as θ_full was. AdamW, gradients clipped to norm 1. No weight decay: it would add a multiple
    of θ_0 to the task vector. The rate rises linearly from 0 in the first of several epochs, then falls to 0.
    Weights keep their types; a GPU with bfloat16 computes in it. directory: an empty one, for the Trainer.

    Seeds torch, NumPy and ``random``. Raises NotFiniteError if the loss is not finite.
    """
    at_a_time = math.gcd(request.batch_size, _AT_A_TIME)
    on_cpu = next(module.parameters()).device.type == "cpu"
    settings = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=request.epochs,
        learning_rate=request.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(len(samples) / request.batch_size) if request.epochs > 1 else 0,
        weight_decay=0.0,
        per_device_train_batch_size=at_a_time,
        gradient_accumulation_steps=request.batch_size // at_a_time,
        seed=request.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu and torch.cuda.is_bf16_supported(),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    settings._n_gpu = min(1, settings.n_gpu)  # several would multiply the batch size
    with Bar(request.epochs * len(samples), "tuning", progress, "sample") as bar:
        watch = _Watch(bar, len(samples), math.ceil(len(samples) / request.batch_size))
        trainer = Trainer(module, settings, data_collator=_collate, train_dataset=samples, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # Take off the wrapper that computes in bfloat16: the model is scored in the same type before and after.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return watch.losses


def _collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What the model takes; a mean over the labels of a batch needs no shares."""
    batch = Batch.of(samples)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


class _Watch(TrainerCallback):
    """Moves the bar, keeps the losses, and stops if a loss is not finite."""

    def __init__(self, bar: Bar, count: int, steps: int) -> None:
        """count, steps: samples and steps of an epoch."""
        self._bar, self._count, self._steps, self._done = bar, count, steps, 0
        self._losses: list[float] = []  # of each step

    @property
    def losses(self) -> list[float]:
        """The mean of each epoch."""
        return [fmean(self._losses[k : k + self._steps]) for k in range(0, len(self._losses), self._steps)]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        loss = logs["loss"]
        self._losses.append(loss)
        if not math.isfinite(loss):
            epoch = math.ceil(state.global_step / self._steps)
            raise NotFiniteError(f"the loss of epoch {epoch} is not finite; nothing was written. Use a lower --lr")
        done = round(state.epoch * self._count)
        self._bar.update(done - self._done, f"step {state.global_step} of {state.max_steps}, loss {loss:.4f}")
        self._done = done

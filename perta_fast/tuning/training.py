"""The training itself, by transformers' Trainer."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError, NotFiniteError, RunError, device_failure, is_of_device, is_out_of_memory
from perta_fast.progress import Bar, Progress
from perta_fast.tuning.request import Request
from perta_fast.tuning.retained import Retained
from perta_fast.tuning.saving import disk_errors
from perta_fast.tuning.schedule import Schedule
from perta_fast.tuning.unfinished import KeptState

_AT_A_TIME = 4  # samples of one backward pass, at most; a batch takes several passes
_WEIGHTS = "trained.safetensors"  # in a kept state


def train_(
    module: nn.Module,
    samples: Sequence[Sample],
    retained: Sequence[Sample],
    request: Request,
    schedule: Schedule,
    kept: KeptState,
    callbacks: Sequence[TrainerCallback],
    progress: Progress,
) -> tuple[list[float], list[float]]:
    """Train what is trainable in ``module``, in place and on its device; goes on with what ``kept`` has.

    Returns for each epoch the mean loss, and the mean divergence on ``retained`` rows, if there are any.

    The loss is the Trainer's own, the mean over all labelled tokens of a batch: most models were tuned with it, and
    θ_f should be tuned as θ_full was. AdamW, gradients clipped to norm 1. No weight decay: it would add a multiple
    of θ_0 to the task vector. The rate rises linearly from 0 in the first of several epochs, then falls to 0.
    Weights keep their types; a GPU with bfloat16 computes in it.

    Seeds torch, NumPy and ``random``. Raises NotFiniteError if the loss is not finite.
    """
    at_a_time = math.gcd(schedule.batch_size, _AT_A_TIME)
    settings = _settings(module, len(samples), request, schedule, at_a_time, kept.directory)
    held = None
    if request.retain_kl:
        held = Retained(module, retained, request.retain_kl, at_a_time, request.seed, settings.bf16)
    steps = math.ceil(len(samples) / schedule.batch_size)
    total, done = schedule.epochs * len(samples), _samples_of(len(kept.begun.losses), steps, len(samples), schedule)
    with Bar(total, "tuning", progress, "sample", done) as bar:
        watch = _Watch(bar, steps, kept, lambda made: _samples_of(made, steps, len(samples), schedule))
        trainer = _KeepingTrainer(
            module, settings, data_collator=_collate, train_dataset=samples, callbacks=[*callbacks, watch]
        )
        trainer.held = held
        trainer.watch, watch.trainer = watch, trainer
        trainer.remove_callback(PrinterCallback)
        if kept.checkpoint is not None:
            _check_progress(kept.checkpoint, len(kept.begun.losses))
        trainer.train(resume_from_checkpoint=kept.checkpoint)
        # Take off the wrapper that computes in bfloat16: the model is scored in the same type before and after.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return watch.by_epoch(watch.losses), watch.by_epoch(watch.divergences)


def _settings(
    module: nn.Module, count: int, request: Request, schedule: Schedule, at_a_time: int, directory: Path
) -> TrainingArguments:
    on_cpu = next(module.parameters()).device.type == "cpu"
    settings = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(count / schedule.batch_size) if schedule.epochs > 1 else 0,
        weight_decay=0.0,
        per_device_train_batch_size=at_a_time,
        gradient_accumulation_steps=schedule.batch_size // at_a_time,
        seed=request.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu and torch.cuda.is_bf16_supported(),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the watch says when
        report_to=request.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    settings._n_gpu = min(1, settings.n_gpu)  # several would multiply the batch size
    return settings


def _samples_of(done: int, steps: int, count: int, schedule: Schedule) -> int:
    """Samples of ``done`` steps, of which an epoch has so many."""
    epochs, rest = divmod(done, steps)
    return epochs * count + rest * schedule.batch_size


def _collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What the model takes; a mean over the labels of a batch needs no shares."""
    batch = Batch.of(samples)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


class _KeepingTrainer(Trainer):
    """A Trainer that adds the divergence on retained rows, and keeps of the model only what is trained.

    divergences: of the backward passes of the step that goes on.
    """

    held: Retained | None = None
    watch: "_Watch"
    divergences: list[float]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.held is None:
            return loss
        number = self.state.global_step * self.args.gradient_accumulation_steps + len(self.divergences)
        divergence = self.held.divergence(model, number)
        self.divergences.append(float(divergence.detach()))
        # The Trainer divides a loss by the passes of a step, unless the model has divided it by the step's tokens.
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return loss + self.held.weight * divergence / (self.current_gradient_accumulation_steps if scaled else 1)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save = super()._save_checkpoint
        self.watch.keep(f"checkpoint-{self.state.global_step}", lambda: save(model, trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with disk_errors():
            save_file({name: t.detach().contiguous() for name, t in trained(self.model).items()}, _weights(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with torch.no_grad(), _fitting(resume_from_checkpoint):
            stored = load_file(_weights(resume_from_checkpoint))
            for name, tensor in trained(self.model).items():
                tensor.copy_(stored[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _fitting(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _fitting(checkpoint):
            super()._load_rng_state(checkpoint)


# What transformers and torch raise for a state of another shape, or none at all.
_NOT_FITTING = (
    *(ArithmeticError, AttributeError, EOFError, FileNotFoundError, LookupError, RuntimeError),
    *(SafetensorError, TypeError, UnpicklingError, ValueError),
)


@contextmanager
def _fitting(checkpoint: str | None) -> Iterator[None]:
    """Raise InputError for a state that its record has the hashes of, and that is still none of this model's.

    Raises RunError where the device failed: that says nothing of the state.
    """
    try:
        yield
    except _NOT_FITTING as error:
        if is_out_of_memory(error):
            raise
        if is_of_device(error):
            raise RunError(f"{device_failure(error)}; that was while the kept state was loaded, which stays") from error
        raise InputError(
            f"{checkpoint}: the kept state does not fit this model ({error}); start over with ‹overwrite›"
        ) from error


def _check_progress(checkpoint: str, steps: int) -> None:
    """Raise InputError unless the trainer's own state is that after so many steps."""
    with _fitting(checkpoint):
        made = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
        if made != steps:
            raise ValueError(f"it is of step {made}, not {steps}")


def _weights(directory: str) -> Path:
    return Path(directory) / _WEIGHTS


class _Watch(TrainerCallback):
    """Moves the bar, keeps losses and states, and stops if a loss is not finite."""

    trainer: _KeepingTrainer

    def __init__(self, bar: Bar, steps: int, kept: KeptState, samples_of: Callable[[int], int]) -> None:
        """steps: of an epoch. samples_of: how many samples so many steps have taken."""
        self._bar, self._steps, self._kept, self._samples_of = bar, steps, kept, samples_of
        self.losses, self.divergences = list(kept.begun.losses), list(kept.begun.divergences)  # of each step

    def by_epoch(self, values: Sequence[float]) -> list[float]:
        """The means of each epoch."""
        return [fmean(values[k : k + self._steps]) for k in range(0, len(values), self._steps)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.divergences = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        loss = logs["loss"]
        self.losses.append(loss)
        if self.trainer.held is not None:
            self.divergences.append(fmean(self.trainer.divergences))
        if not math.isfinite(loss):
            epoch = math.ceil(state.global_step / self._steps)
            raise NotFiniteError(f"the loss of epoch {epoch} is not finite; nothing was written. Use a lower ‹lr›")
        step = state.global_step
        count = self._samples_of(step) - self._samples_of(step - 1)
        self._bar.update(count, f"step {step} of {state.max_steps}, loss {loss:.4f}")
        if state.global_step < state.max_steps and self._kept.is_due():
            control.should_save = True

    def keep(self, name: str, save: Callable[[], None]) -> None:
        """Keep the state that ``save`` writes, and how far the training has come with it."""
        self._kept.keep(name, save, self.losses, self.divergences)


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}

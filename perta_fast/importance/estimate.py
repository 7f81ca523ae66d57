"""Estimate importance by back-propagation, folding each gradient away as soon as autograd has made it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from perta_fast.checkpoint import Checkpoint
from perta_fast.data import Record, Sample, encode, load_records, records_from
from perta_fast.errors import InputError, RunError
from perta_fast.importance.store import Importance, ImportanceMetadata
from perta_fast.losses import Batch, batches_by_length, per_sample_losses
from perta_fast.ops import accumulate_, accumulate_square_
from perta_fast.output import check_output
from perta_fast.progress import sample_bar
from perta_fast.report import installed_versions
from perta_fast.rules import ESTIMATORS, Estimator

Data = str | Path | Sequence[Mapping[str, Any]] | Sequence[Sample]


def estimate_importance(
    model_or_path: str | Path | nn.Module,
    data: Data,
    estimator: Estimator = "grad",
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Importance:
    """Per-parameter importance of a causal language model on ``data`` (PerTA, arXiv 2601.22030).

    The loss of a sample is the mean over its unmasked labels of the token cross-entropy, whatever the batch it
    is in. ``grad`` is the signed mean over samples of its gradient, which serves rule grad by its magnitude and
    rule fisher by its square; ``empirical-fisher`` is the mean of the squared per-sample gradient, from batches
    of one.

    model_or_path: a checkpoint directory, or a module whose forward takes input_ids and attention_mask and
    returns logits (N, T, V). Only parameters with requires_grad are covered; tied ones count once. A module is
    left as it was found, its gradients included.
    data: a JSON lines file, records in the same forms, or ``Sample``s. tokenizer: needed for records with a
    module; read from the checkpoint otherwise. batch_size: samples a backward for ``grad``.
    max_length: tokens a sample is cut to; None takes the model's own limit. Cut samples are counted.
    device, dtype: where and in what type a checkpoint is run; None takes CUDA if there is one, and the
    checkpoint's own type. Accumulators are float32 whatever the type. out: directory to save to.

    Memory: the model, 4 bytes a parameter for the accumulators, activations of one batch, and the gradients
    that autograd has in flight (one layer's). Raises InputError for bad arguments or data, RunError if a loss
    is not finite (naming the samples).
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if out is not None:
        inputs = [] if isinstance(model_or_path, nn.Module) else [Path(model_or_path)]
        check_output(Path(out).absolute(), overwrite=overwrite, inputs=inputs)
    records = _records(data)
    if isinstance(model_or_path, nn.Module):
        subject = Subject(model_or_path, tokenizer, "live module")
    else:
        subject = load_subject(Path(model_or_path), device, dtype, tokenizer)
    return estimate_on(
        subject,
        data,
        records,
        estimator,
        batch_size=batch_size,
        max_length=max_length,
        out=out,
        overwrite=overwrite,
        progress=progress,
    )


@dataclass(frozen=True)
class Subject:
    """What importance is measured on: a module, its tokenizer if there is one, and where it came from."""

    module: nn.Module
    tokenizer: Any
    origin: str


def estimate_on(
    subject: Subject,
    data: Data,
    records: list[Record],
    estimator: Estimator,
    *,
    batch_size: int,
    max_length: int | None,
    out: str | Path | None,
    overwrite: bool,
    progress: bool,
    description: str = "importance",
) -> Importance:
    """``estimate_importance`` once the model is loaded and the data is read."""
    samples = _samples(data, records, subject.tokenizer, max_length or _context_length(subject.module))
    accumulators = accumulate(subject.module, samples, estimator, batch_size, description, progress)
    versions = installed_versions()
    importance = Importance(
        accumulators,
        ImportanceMetadata(
            estimator=estimator,
            data_hash=_hash(data, samples),
            sample_count=len(samples),
            truncated_count=sum(sample.truncated for sample in samples),
            label_count=sum(sample.label_count for sample in samples),
            evaluated_at=subject.origin,
            perta_fast_version=versions.get("perta-fast", ""),
            torch_version=versions.get("torch", ""),
            transformers_version=versions.get("transformers", ""),
        ),
    )
    _check_finite(importance)
    if out is not None:
        importance.save(out, overwrite=overwrite)
    return importance


def accumulate(
    module: nn.Module,
    samples: Sequence[Sample],
    estimator: Estimator,
    batch_size: int,
    description: str = "importance",
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """The mean over ``samples`` of gradients, or of squared ones, by parameter name; float32.

    What ``estimate_importance`` runs once model and data are there.
    """
    squared = estimator == "empirical-fisher"
    accumulators = {
        name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }
    if not accumulators:
        raise InputError("the model has no floating-point parameter that requires a gradient")
    device = next(iter(accumulators.values())).device
    with (
        _ready_to_measure(module),
        _gradients_folded_into(module, accumulators, squared),
        sample_bar(len(samples), description, progress) as bar,
    ):
        for numbers in batches_by_length(samples, 1 if squared else batch_size):
            losses = per_sample_losses(module, Batch.of([samples[k] for k in numbers], device))
            if not bool(torch.isfinite(losses).all()):
                bad = [numbers[k] for k in (~torch.isfinite(losses)).nonzero().flatten().tolist()]
                raise RunError(
                    f"the loss of sample {', '.join(map(str, bad))} (counted from 0) is not finite; "
                    "look at the sample, or run the model in float32 or bfloat16"
                )
            losses.sum().backward()
            bar.update(len(numbers))
    for accumulator in accumulators.values():
        accumulator.div_(len(samples))
    return accumulators


@contextmanager
def _gradients_folded_into(
    module: nn.Module, accumulators: Mapping[str, torch.Tensor], squared: bool
) -> Iterator[None]:
    """Fold every parameter's gradient, complete over all its uses, and free it at once."""
    fold = accumulate_square_ if squared else accumulate_

    def hook_for(accumulator: torch.Tensor) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            fold(accumulator, gradient.to_dense() if gradient.is_sparse else gradient.contiguous())
            parameter.grad = None

        return hook

    parameters = dict(module.named_parameters())
    handles = [
        parameters[name].register_post_accumulate_grad_hook(hook_for(accumulator))
        for name, accumulator in accumulators.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _ready_to_measure(module: nn.Module) -> Iterator[None]:
    """Dropout off, no gradients left over; all put back at the end."""
    training = {part: part.training for part in module.modules()}
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    module.eval()
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for part, mode in training.items():
            part.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def load_subject(
    path: Path, device: str | torch.device | None, dtype: torch.dtype | None, tokenizer: Any = None
) -> Subject:
    """Load a checkpoint and its tokenizer with transformers. Raises InputError if either cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    Checkpoint.open(path)  # its errors name what is wrong with the files
    chosen = choose_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: transformers cannot load this model: {error}") from error
    return Subject(model.to(chosen), tokenizer, str(path.resolve()))


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA if there is one. Raises InputError if it is not to be had."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not one that torch knows") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no CUDA device here")
    return chosen


def _context_length(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _records(data: Data) -> list[Record]:
    if isinstance(data, str | Path):
        return load_records(data)
    if not data:
        raise InputError("there are no samples")
    if isinstance(data[0], Sample):
        return []
    return records_from(data)  # type: ignore[arg-type]


def _samples(data: Data, records: list[Record], tokenizer: Any, max_length: int) -> list[Sample]:
    if not records:
        return list(data)  # type: ignore[arg-type]
    if tokenizer is None:
        raise InputError("a tokenizer is needed to turn records into tokens; pass tokenizer=")
    return encode(records, tokenizer, max_length)


def _hash(data: Data, samples: Sequence[Sample]) -> str:
    """BLAKE3 of the file, or of the token ids and labels where there is none."""
    if isinstance(data, str | Path):
        return blake3(Path(data).read_bytes()).hexdigest()
    return blake3(repr([(s.input_ids, s.labels) for s in samples]).encode()).hexdigest()


def _check_finite(importance: Importance) -> None:
    for name, tensor in importance.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"the importance of {name} is not finite; run the model in float32 or bfloat16 (--dtype)"
            )

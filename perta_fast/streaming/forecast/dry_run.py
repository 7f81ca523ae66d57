"""A streamed run's estimate from configuration, data and tokenizer, without the weights: ``--dry-run``.

Arguments and data are checked before torch is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.arguments import check_device, check_sizes
from perta_fast.data.chat import ChatSettings
from perta_fast.data.forms import Fields
from perta_fast.data.rows import Row, read_data
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.reading import exists
from perta_fast.rules import Estimator

if TYPE_CHECKING:
    import torch

    from perta_fast.streaming.forecast.costs import Estimate
    from perta_fast.streaming.forecast.forecast import Forecast
    from perta_fast.streaming.model.structure import Structure


@dataclass(frozen=True)
class Conditions:
    """How the model would be run; the fields are arguments of ``unlearn``. memory, device_memory: bytes."""

    system_prompt: str | None
    date_string: str | None
    batch_size: int
    max_length: int | None
    device: "str | torch.device | None"
    dtype: "torch.dtype | None"
    memory: int | None
    device_memory: int | None
    fields: Fields | None = None
    download: bool = False


def preview(
    subject: Path,
    data: Mapping[str, Path],
    estimator: Estimator | None,
    destination: Path,
    conditions: Conditions,
    *,
    subtract: bool,
    kept: int = 0,
    kept_at: Path | None = None,
    low_rank: bool = False,
    threads: int = 1,
    ranks: int = 1,
) -> "Forecast":
    """The costs of streaming ``data`` through the model in ``subject``/config.json.

    data: files by role. estimator: of importances; None is for preconditioning, and ``data`` is the retain data.
    destination: of the result. subtract: for ``unlearn``, not for an importance or a θ_f alone. kept: bytes of a
    parameter in the importances that are written; kept_at: where ``unlearn`` keeps them. low_rank: θ_f is an adapter.
    ranks: processes that the samples are dealt to; the costs are those of one.
    If the directory has no tokenizer, every sample counts as ``max_length`` tokens. A file is written to measure the
    disk, and removed; nothing else is. Raises InputError for bad input, and if memory or disk are too small.
    """
    max_length = conditions.max_length
    check_sizes(conditions.batch_size, max_length)
    check_device(conditions.device)
    subject = local_model(subject, conditions.download)
    if not exists(subject / "config.json"):
        raise InputError(f"{subject}: has no config.json, from which the costs of its model are estimated")
    rows = {role: read_data(local_data(path, conditions.download), conditions.fields)[0] for role, path in data.items()}
    chat = ChatSettings.of(conditions.system_prompt, conditions.date_string)
    # Imported late: what is wrong so far was said without waiting for torch.
    from perta_fast.models.loading import choose_device
    from perta_fast.streaming.forecast.choice import Budget, choose_schedule, rates_for
    from perta_fast.streaming.forecast.costs import Load
    from perta_fast.streaming.forecast.forecast import Forecast
    from perta_fast.streaming.forecast.preconditioning_costs import PreconditioningEstimate
    from perta_fast.streaming.forecast.walk_costs import WalkEstimate
    from perta_fast.streaming.model.structure import Structure

    device = choose_device(conditions.device)
    structure = Structure.build(subject, conditions.dtype, device=device)
    tokenizer = _tokenizer(subject)
    if tokenizer is None and max_length is None:
        raise InputError(
            f"{subject}: has no tokenizer, so the lengths of the samples are not known; give ‹max_length›, and "
            "each will count that many tokens"
        )
    if tokenizer is not None:
        tokenizer = chat.given_to(tokenizer)
    lengths = [_lengths(structure, subject, tokenizer, of_role, max_length) for of_role in rows.values()]
    load = Load(lengths, estimator == "empirical-fisher", subtract, kept)
    estimate: Estimate
    if estimator is None:
        ranks = 1  # the first one does it
        estimate = PreconditioningEstimate(structure, load, device, low_rank=low_rank, threads=threads)
    else:
        estimate = WalkEstimate(structure, load.share(ranks), device, threads)
    budget = Budget.at(destination, conditions.memory, conditions.device_memory, ranks, kept_at)
    chosen = choose_schedule(estimate, conditions.batch_size, budget)
    shard = next(iter(sorted(subject.glob("*.safetensors"))), None)
    counts = ", ".join(
        f"{len(tokens)} {role} samples of {sum(tokens)} tokens" for role, tokens in zip(rows, lengths, strict=True)
    )
    guess = "" if tokenizer is not None else " (there is no tokenizer: each counts --max-length tokens)"
    sizes = {role: {"samples": len(of), "tokens": sum(of)} for role, of in zip(rows, lengths, strict=True)}
    forecast = Forecast.of(chosen, rates_for(chosen, destination, shard), ranks, sizes)
    return forecast.after(f"data: {counts}{guess}\n")


def _tokenizer(subject: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(subject, local_files_only=True, trust_remote_code=False)
    except Exception:  # a missing or damaged tokenizer raises many kinds of errors
        return None


def _lengths(
    structure: "Structure", subject: Path, tokenizer: Any, rows: Sequence[Row], max_length: int | None
) -> list[int]:
    if tokenizer is None:
        assert max_length is not None
        return [max_length] * len(rows)
    from perta_fast.models.loading import Subject, samples_for

    samples = samples_for(Subject(structure.model, tokenizer, str(subject)), rows, max_length)
    return [len(sample.input_ids) for sample in samples]

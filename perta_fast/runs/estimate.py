"""Estimate importance: model and data checked and loaded, gradients accumulated, the result described."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.checkpoints.quantised import open_plain, refuse_quantised_module
from perta_fast.checkpoints.weights_hash import weights_hash
from perta_fast.checkpoints.wrappers import plain_name
from perta_fast.data.chat import Told
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.sharded import held
from perta_fast.dtypes import ITEM_SIZES, torch_name
from perta_fast.errors import InputError
from perta_fast.files.disk_space import check_space
from perta_fast.files.new_directory import leftovers
from perta_fast.importance.gradients import accumulate, check_finite
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import Importance, ImportanceMetadata, stored_name
from perta_fast.memory import return_freed_blocks
from perta_fast.models.in_use import measuring
from perta_fast.models.loading import Subject, choose_device, load_subject
from perta_fast.models.stored_names import as_stored
from perta_fast.models.wrapped import unwrapped
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions
from perta_fast.rules import Estimator

if TYPE_CHECKING:
    from perta_fast.streaming.model.skeleton import Skeleton
    from perta_fast.streaming.schedule import Schedule


LIVE = "live module"  # where an importance of a module was taken


def open_subject(
    model_or_path: str | Path | nn.Module,
    tokenizer: Any,
    text: bool,
    stream: bool,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    progress: Progress,
) -> "tuple[Subject, Skeleton | None]":
    """A module, or a checkpoint, loaded, or its structure alone; text: whether there is text to tokenise."""
    if isinstance(model_or_path, nn.Module):
        module = unwrapped(model_or_path)
        _check_module(module, stream, device, dtype)
        return Subject(module, tokenizer, LIVE), None
    open_plain(model_or_path)
    path = Path(model_or_path)
    skeleton = open_skeleton(path, device, dtype) if stream else None
    structure = None if skeleton is None else skeleton.model
    return load_subject(path, device, dtype, tokenizer, structure=structure, text=text, progress=progress), skeleton


def _check_module(
    module: nn.Module, stream: bool, device: str | torch.device | None, dtype: torch.dtype | None
) -> None:
    if stream:
        raise InputError("‹stream› is for checkpoint directories; a live module is in memory already")
    if device is not None or dtype is not None:
        raise InputError("‹device› and ‹dtype› are for checkpoints; move or convert the module itself")
    refuse_quantised_module(module)


@dataclass(frozen=True)
class Estimation:
    """A loaded model, and how importances of it are estimated, whatever the data.

    skeleton: where the weights are read from layer by layer; None if they are in memory. memory, device_memory:
    as in ``estimate_importance``. read_as: which fields of the data were taken for what.
    told: what the chat template was told with it.
    """

    subject: Subject
    estimator: Estimator
    batch_size: int = 8
    progress: Progress = True
    ranks: Ranks = Ranks.ALONE
    skeleton: "Skeleton | None" = None
    memory: int | None = None
    device_memory: int | None = None
    read_as: str = ""
    told: Told = field(default_factory=Told)

    @property
    def device(self) -> torch.device:
        """Where the gradients are computed."""
        return self.subject.device if self.skeleton is None else self.skeleton.device

    @cached_property
    def weights_hash(self) -> str:
        """By what the weights are known again; "" of a live module.

        Raises RunError if they have changed since they were opened: what was loaded may be others.
        """
        checkpoint = self.subject.checkpoint
        if checkpoint is None:
            return ""
        digest = weights_hash(checkpoint)
        check_as_opened([checkpoint])
        return digest

    def describe(self, samples: Sequence[Sample], data_hash: str, one_by_one: Sequence[str] = ()) -> ImportanceMetadata:
        """What an importance on ``samples`` says of itself. Raises RunError as ``weights_hash``."""
        versions, count, rows = installed_versions(), row_count(samples), RowDigests.of(samples)
        return ImportanceMetadata(
            estimator=self.estimator,
            data_hash=data_hash,
            sample_count=count,
            truncated_count=truncated_count(samples),
            label_count=sum(sample.label_count for sample in samples),
            evaluated_at=self.subject.origin,
            one_by_one=", ".join(map(plain_name, one_by_one)),
            read_as=self.read_as,
            rows_hash=rows.hash if rows.count == count else "",
            weights_hash=self.weights_hash,
            dtype=torch_name(next(self.subject.module.parameters()).dtype),
            perta_fast_version=versions.get("perta-fast", ""),
            torch_version=versions.get("torch", ""),
            transformers_version=versions.get("transformers", ""),
            **vars(self.told),
        )

    def schedule(
        self,
        data: Iterable[Sequence[Sample]],
        destination: Path,
        *,
        subtract: bool = False,
        kept: int = 0,
        kept_at: Path | None = None,
        threads: int = 1,
    ) -> "Schedule":
        """How a streamed run over ``data`` to ``destination`` is cut; see ``Load``. kept_at: as in ``schedule_for``."""
        from perta_fast.streaming.forecast.choice import schedule_for
        from perta_fast.streaming.forecast.costs import Load
        from perta_fast.streaming.forecast.walk_costs import WalkEstimate

        skeleton, ranks = self.skeleton, self.ranks
        assert skeleton is not None
        lengths = [[len(sample.input_ids) for sample in samples] for samples in data]
        load = Load(lengths, self.estimator == "empirical-fisher", subtract, kept).share(ranks.world)
        schedule: Schedule | None = None
        with ranks.together("the choice of a schedule"):
            if ranks.first:
                schedule = schedule_for(
                    WalkEstimate(skeleton, load, skeleton.device, threads),
                    self.batch_size,
                    destination,
                    self.memory,
                    self.device_memory,
                    skeleton.first_shard,
                    self.progress is True,
                    ranks.world,
                    kept_at,
                )
        if self.memory is not None:
            return_freed_blocks()
        shared: Schedule = ranks.share(schedule)
        return shared


def estimate_on(
    how: Estimation,
    samples: Sequence[Sample],
    data_hash: str,
    *,
    out: str | Path | None,
    overwrite: bool = False,
    description: str = "importance",
    stored: str = "float32",
) -> Importance:
    """``estimate_importance`` once the model is loaded and the data is checked. stored: the type in ``out``."""
    if how.skeleton is not None:
        from perta_fast.streaming.importance_only import write_importance

        assert out is not None
        return write_importance(
            how.skeleton,
            samples,
            how.describe(samples, data_hash),
            how.schedule([samples], Path(out), kept=ITEM_SIZES[stored_name(stored)]),
            out=out,
            overwrite=overwrite,
            description=description,
            stored=stored,
            progress=how.progress,
            ranks=how.ranks,
        )
    module = how.subject.module
    if out is not None:
        with how.ranks.together(description):
            size = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            check_space({Path(out): ITEM_SIZES[stored_name(stored)] * size}, leftovers(Path(out)))
    with ExitStack() as held_module:
        with how.ranks.together(description):
            held_module.enter_context(measuring(module))
        found = accumulate(module, samples, how.estimator, how.batch_size, description, how.progress, how.ranks)
    with how.ranks.together(description):
        metadata = how.describe(samples, data_hash, found.one_by_one)
        rows = RowDigests.of(samples) if metadata.rows_hash else None
        importance = Importance(as_stored(module, found.means), metadata, rows=rows)
        for name, tensor in importance.tensors.items():
            check_finite(name, held(tensor))
    if out is not None:
        importance.save(out, overwrite=overwrite, dtype=stored, group=how.ranks.group)
    return importance


def open_skeleton(path: Path, device: str | torch.device | None, dtype: torch.dtype | None) -> "Skeleton":
    """The structure of a checkpoint, for a walk. Raises InputError if its files are damaged."""
    from perta_fast.streaming.model.skeleton import Skeleton

    Checkpoint.open(path)
    return Skeleton.open(path, choose_device(device), dtype)

"""Estimate importance: model and data checked and loaded, gradients accumulated, the result described."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from torch import nn

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain, refuse_quantised_module
from perta_fast.checkpoints.weights_hash import weights_hash
from perta_fast.checkpoints.wrappers import plain_name
from perta_fast.data.chat import ChatSettings, Told, today
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, read_as
from perta_fast.data.given_data import Data
from perta_fast.data.python_rows import MapStyle, rows_of
from perta_fast.data.rows import Row, read_data, rows_from
from perta_fast.data.samples import Sample, row_count, truncated_count
from perta_fast.data.tokenised import is_tokenised, samples_from
from perta_fast.distributed.ranks import Ranks
from perta_fast.distributed.sharded import held
from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.new_directory import check_output, check_unfinished
from perta_fast.files.reading import checked_path
from perta_fast.importance.gradients import accumulate, check_finite
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import Importance, ImportanceMetadata
from perta_fast.memory import return_freed_blocks
from perta_fast.models.in_use import measuring
from perta_fast.models.loading import Subject, check_sizes, choose_device, load_subject, samples_and_told
from perta_fast.models.stored_names import as_stored
from perta_fast.models.wrapped import unwrapped
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions
from perta_fast.rules import ESTIMATORS, Estimator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from perta_fast.streaming.model.skeleton import Skeleton
    from perta_fast.streaming.schedule import Schedule


LIVE = "live module"  # where an importance of a module was taken


def estimate_importance(
    model_or_path: str | Path | nn.Module,
    data: Data,
    estimator: Estimator = "grad",
    *,
    fields: Fields | None = None,
    download: bool = False,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Importance:
    """Per-parameter importance of a causal language model on ``data`` (PerTA, arXiv 2601.22030).

    The loss of a sample is the mean over its unmasked labels of the token cross-entropy, whatever the batch it is in.
    ``grad`` is the signed mean over samples of its gradient, which serves rule grad by its magnitude and rule fisher by
    its square; ``empirical-fisher`` is the mean of the squared gradient of each sample alone, exact although computed
    in batches (``per_sample``).

    model_or_path: a checkpoint directory, or a module whose forward takes input_ids, attention_mask and use_cache and
    returns an object with logits (N, T, V). Only parameters with requires_grad are covered; tied ones count once; all
    are named as a checkpoint stores them. A module is left as it was found, its gradients included; a second call on it
    meanwhile is refused.
    data: a data file as ``unlearn`` takes it, rows in the same forms (a list, a data set, a DataFrame, a dictionary of
    columns), ``Sample``s, or what is tokenised already: rows with ``input_ids`` (T,), as transformers' Trainer takes
    them, or padded batches of rows (N, T) of a loader. These may have ``labels``, -100 where there is no loss (without,
    every token counts), and an ``attention_mask``, 0 on padding, which is cut off; other columns are not read. All is
    read once, and kept as token ids. The hash in the metadata is a file's own, or of token ids and labels.
    fields, download: as in ``unlearn``. tokenizer: needed for rows with a module; read from the checkpoint otherwise.
    batch_size: samples a backward pass, however the data came. max_length: tokens a row is cut to, if that is less than
    the model's own limit; cut ones are counted. system_prompt, date_string: for the chat template (docs/data.md).
    device, dtype: where and in what type a checkpoint is run (not for modules); None takes CUDA if there is one, and
    the checkpoint's own type. Accumulators are float32 whatever the type. out: directory to save to.
    stream: keep one decoder layer of a checkpoint in memory at a time, for models larger than the memory; needs
    ``out``, where the result is read from. memory, device_memory: bytes that this may take; None sets no limit.
    group: the processes that deal the samples among them. Each calls this with the same arguments and has the whole
    result, which is that of one process but for the order of the sums; ``out`` must lie where all see it. None: this
    process alone. Of a module that FSDP2 or tensor parallelism has sharded, the result is sharded as its parameters
    are; group is then that of the processes its data is divided among, and estimator ``grad``.
    progress: as in ``apply``.

    Raises InputError for bad arguments or data, RunError if a loss is not finite (naming the samples).
    """
    ranks = Ranks.of(group)
    day = ranks.share(today())
    with ranks.together("the loading of model and data"):
        if estimator not in ESTIMATORS:
            raise InputError(f"estimator is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}")
        check_sizes(batch_size, max_length)
        if isinstance(model_or_path, str | Path):
            model_or_path = local_model(model_or_path, download)
        if isinstance(data, str | Path):
            data = local_data(data, download)
        chat = ChatSettings.of(system_prompt, date_string, day)
        if out is not None:
            _check_out(out, overwrite, model_or_path, data)
        rows: list[Row] | list[Sample]
        rows, digest = read_data(data, fields) if isinstance(data, str | Path) else (_checked_rows(data, fields), None)
        if stream and out is None and not isinstance(model_or_path, nn.Module):
            raise InputError("stream needs out: a directory to write the importance to")
        shown = ranks.first and progress
        text = isinstance(rows[0], Row)
        subject, skeleton = _opened(model_or_path, tokenizer, text, stream, device, dtype, shown)
        samples, told = samples_and_told(subject, rows, max_length, chat, shown)
        digest = digest or _hash_samples(samples)
    with ranks.together("the data"):
        if len(set(ranks.gather(digest))) > 1:
            raise InputError("the processes were given different data; each must be given all of it")
    how = Estimation(
        subject, estimator, batch_size, progress, ranks, skeleton, memory, device_memory, read_as(rows), told
    )
    return estimate_on(how, samples, digest, out=out, overwrite=overwrite)


def _check_out(out: str | Path, overwrite: bool, model_or_path: str | Path | nn.Module, data: Data) -> None:
    inputs = [] if isinstance(model_or_path, nn.Module) else [Path(model_or_path)]
    inputs += data_files(data) if isinstance(data, Path) else []
    check_output(checked_path(out), overwrite=overwrite, inputs=inputs)
    check_unfinished(Path(out), overwrite=overwrite)


def _opened(
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
        raise InputError("stream is for checkpoint directories; a live module is in memory already")
    if device is not None or dtype is not None:
        raise InputError("device and dtype are for checkpoints; move or convert the module itself")
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
        """By what the weights are known again; "" of a live module."""
        return "" if self.subject.origin == LIVE else weights_hash(Checkpoint.open(self.subject.origin))

    def describe(self, samples: Sequence[Sample], data_hash: str, one_by_one: Sequence[str] = ()) -> ImportanceMetadata:
        """What an importance on ``samples`` says of itself."""
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
        kept: bool = False,
        threads: int = 1,
    ) -> "Schedule":
        """How a streamed run over ``data`` to ``destination`` is cut; see ``Load``."""
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
            how.schedule([samples], Path(out)),
            out=out,
            overwrite=overwrite,
            description=description,
            stored=stored,
            progress=how.progress,
            ranks=how.ranks,
        )
    module = how.subject.module
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


def _checked_rows(data: Iterable[Any] | MapStyle, fields: Fields | None) -> list[Row] | list[Sample]:
    rest = rows_of(data)
    first = list(islice(rest, 1))
    if fields is not None and first and (is_tokenised(first[0]) or isinstance(first[0], Sample)):
        raise InputError("fields is for rows of text, and this data is tokenised already; leave it out")
    if first and is_tokenised(first[0]):
        return samples_from(chain(first, rest))
    rows = [*first, *rest]
    if rows and all(isinstance(row, Sample) for row in rows):
        return rows
    return rows_from(rows, fields)


def _hash_samples(samples: Sequence[Sample]) -> str:
    """BLAKE3 of token ids and labels, where there is no file."""
    return blake3(repr([(s.input_ids, s.labels) for s in samples]).encode()).hexdigest()

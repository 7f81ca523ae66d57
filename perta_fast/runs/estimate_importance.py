"""``estimate_importance``: arguments and data are checked before torch is imported."""

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from perta_fast.arguments import check_device, check_limits, check_sizes
from perta_fast.checkpoints.quantised import open_loadable
from perta_fast.data.chat import ChatSettings, today
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, read_as
from perta_fast.data.given_data import Data
from perta_fast.data.python_rows import MapStyle, rows_of
from perta_fast.data.rows import Row, read_data, rows_from
from perta_fast.data.samples import Sample
from perta_fast.data.tokenised import is_tokenised, samples_from
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.hub import local_data, local_model
from perta_fast.files.new_directory import check_output, check_unfinished
from perta_fast.files.reading import checked_path
from perta_fast.importance.store import Importance
from perta_fast.progress import Progress
from perta_fast.records.declared import checked_arguments
from perta_fast.rules import ESTIMATORS, Estimator

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup


@checked_arguments
def estimate_importance(
    model_or_path: "str | Path | nn.Module",
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
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
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
    the checkpoint's own type, or float32 on a CPU that is slow in that. Accumulators are always float32. out: directory
    to save to.
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
            raise InputError(f"‹estimator› is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}")
        check_sizes(batch_size, max_length)
        check_limits(stream, memory, device_memory)
        check_device(device)
        if isinstance(model_or_path, str | Path):
            model_or_path = local_model(model_or_path, download)
        if isinstance(data, str | Path):
            data = local_data(data, download)
        chat = ChatSettings.of(system_prompt, date_string, day)
        if out is not None:
            _check_out(out, overwrite, model_or_path, data)
        rows: list[Row] | list[Sample]
        rows, digest = read_data(data, fields) if isinstance(data, str | Path) else (_checked_rows(data, fields), None)
        if stream and out is None and isinstance(model_or_path, str | Path):
            raise InputError("‹stream› needs ‹out›: a directory to write the importance to")
        if isinstance(model_or_path, str | Path):
            open_loadable(model_or_path)
        # Imported late: what is wrong so far is said without waiting for torch.
        from perta_fast.models.loading import samples_and_told
        from perta_fast.runs.estimate import Estimation, estimate_on, open_subject

        shown = ranks.first and progress
        text = isinstance(rows[0], Row)
        subject, skeleton = open_subject(model_or_path, tokenizer, text, stream, device, dtype, shown)
        samples, told = samples_and_told(subject, rows, max_length, chat, shown)
        digest = digest or _hash_samples(samples)
    with ranks.together("the data"):
        if len(set(ranks.gather(digest))) > 1:
            raise InputError("the processes were given different data; each must be given all of it")
    how = Estimation(
        subject, estimator, batch_size, progress, ranks, skeleton, memory, device_memory, read_as(rows), told
    )
    return estimate_on(how, samples, digest, out=out, overwrite=overwrite)


def _check_out(out: str | Path, overwrite: bool, model_or_path: "str | Path | nn.Module", data: Data) -> None:
    inputs = [Path(model_or_path)] if isinstance(model_or_path, str | Path) else []
    inputs += data_files(data) if isinstance(data, Path) else []
    check_output(checked_path(out), overwrite=overwrite, inputs=inputs)
    check_unfinished(Path(out), overwrite=overwrite)


def _checked_rows(data: Iterable[Any] | MapStyle, fields: Fields | None) -> list[Row] | list[Sample]:
    rest = rows_of(data)
    first = list(islice(rest, 1))
    if fields is not None and first and (is_tokenised(first[0]) or isinstance(first[0], Sample)):
        raise InputError("‹fields› is for rows of text, and this data is tokenised already; leave it out")
    if first and is_tokenised(first[0]):
        return samples_from(chain(first, rest))
    rows = [*first, *rest]
    if rows and all(isinstance(row, Sample) for row in rows):
        return rows
    return rows_from(rows, fields)


def _hash_samples(samples: Sequence[Sample]) -> str:
    """BLAKE3 of token ids and labels, where there is no file."""
    return blake3(repr([(s.input_ids, s.labels) for s in samples]).encode()).hexdigest()

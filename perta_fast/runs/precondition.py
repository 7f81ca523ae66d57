"""``precondition``: everything is checked before the model is loaded."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.arguments import check_device, check_limits, check_sizes
from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import PRECONDITIONING
from perta_fast.checkpoints.fingerprint import check_as_opened
from perta_fast.checkpoints.quantised import open_loadable
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields, check_fields
from perta_fast.data.given_data import Data, source_of
from perta_fast.data.rows import read_data
from perta_fast.errors import InputError
from perta_fast.files.apart import check_name
from perta_fast.files.disk_space import check_space
from perta_fast.files.hashing import hash_files
from perta_fast.files.hub import local_model
from perta_fast.files.new_directory import (
    PRECONDITIONING_STATE,
    OutputDirectory,
    check_replaceable,
    kept_if_stopped,
    partial_path,
)
from perta_fast.files.reading import checked_path, exists
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.preconditioning.unfinished import LAYERS_KEPT, Begun, check_record, commit_walk, going_on
from perta_fast.progress import Bar, Progress
from perta_fast.records.declared import checked_arguments
from perta_fast.records.file_record import FileRecord
from perta_fast.records.report import describe_files
from perta_fast.rules import DEFAULT_MU, PRECONDITIONED, check_mu
from perta_fast.subtraction.changed_inputs import check_sources_as_opened
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.task_vector import check_task_vector

if TYPE_CHECKING:
    import torch


@checked_arguments
def precondition(
    base: str | Path,
    tuned: str | Path,
    retain: Data,
    out: str | Path,
    *,
    model: str | Path | None = None,
    mu: float = DEFAULT_MU,
    fields: Fields | None = None,
    download: bool = False,
    batch_size: int = 8,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    overwrite: bool = False,
    progress: Progress = True,
) -> Preconditioning:
    """Make a θ_f whose task vector hardly touches what the retain data sends through the model.

    For every linear map but the output head, D = θ_f - θ_0 becomes D (I + mu A / a)⁻¹. A is the mean of x xᵀ over the
    inputs x of the map on all tokens of the retain data; a is its mean eigenvalue. All other parameters become those of
    ``base``. Subtract the result by rule ``tv``, with a larger strength. ``unlearn`` does both by rule
    ``preconditioned``.

    base: a checkpoint directory, θ_0. tuned: θ_f, a checkpoint, or a LoRA adapter of ``base``, of which only A changes.
    retain: a data file or rows, as for ``unlearn``, as are fields and download. out: directory to make, of the same
    kind as ``tuned``, with the record that is returned; what was changed is float32, and a checkpoint all of it. model:
    the model whose inputs are seen; θ_full is best; None takes ``base``. mu: 0, which leaves the linear maps as they
    are, to 1e4. batch_size: samples, of one length, at a time. max_length: tokens that a sample is cut to, within the
    model's own limit. system_prompt, date_string: as for ``unlearn``. device: None takes CUDA if there is one. dtype:
    that the model runs in; None is as for ``estimate_importance``, or float32 for float16. stream: hold one decoder
    layer in memory at a time; the result has the same values. memory, device_memory: bytes that a streamed run may
    take, by smaller batches; None sets no limit. overwrite: replace ``out``.

    Memory: the model, and 4 d_in² bytes for each different input of its linear maps; then, if ``tuned`` is a
    checkpoint, two models in float32. With ``stream`` that of one layer, and the disk holds the hidden states of all
    tokens at two layers. Raises InputError for bad input, NotFiniteError if an input of a map is not finite, RunError
    if ``out`` cannot be written, or an input changes meanwhile. Then, or after an interrupt, nothing is left behind.
    But with ``stream``, the layers that were done are kept (``errors.Interrupted``), and the same call without
    ``overwrite`` goes on with them.

    Source: SAGE (arXiv 2606.18309).
    """
    check_sizes(batch_size, max_length)
    check_limits(stream, memory, device_memory)
    check_mu(mu)
    check_fields(fields)
    check_device(device)
    chat = ChatSettings.of(system_prompt, date_string)
    base, tuned = local_model(base, download), local_model(tuned, download)
    source = source_of(retain, download, "retain")
    model = base if model is None else local_model(model, download)
    check_name(out)
    final = Path(os.path.realpath(checked_path(out)))
    begun = Begun.load(partial_path(final) / PRECONDITIONING_STATE) if stream and not overwrite else None
    if begun is not None and begun.overwrite:
        check_replaceable(final, [PRECONDITIONING], "the walk")
        overwrite = True
    how = going_on(source, overwrite)
    target = OutputDirectory(
        final,
        overwrite=overwrite,
        inputs=[base, tuned, model, *data_files(source)],
        resume=begun is not None,
        going_on=how,
    )
    check_tuned(base, tuned)
    sources = Sources.open(base, base, tuned, common_rows=True)
    seen = open_loadable(model)
    rows, digest = read_data(source, fields)
    check_task_vector(sources)
    check_space({target.final: vector_size(base, tuned)}, [target.path])
    # Imported late: what is wrong so far is said without waiting for torch.
    from perta_fast.runs.making_tuned import Making

    making = Making(
        base=base,
        tuned=tuned,
        seen_at=model,
        retain=source,
        batch_size=batch_size,
        max_length=max_length,
        chat=chat,
        device=device,
        dtype=dtype,
        progress=progress,
        stream=stream,
        memory=memory,
        device_memory=device_memory,
    )
    walk = None
    if stream:
        from perta_fast.streaming.kept_walk import KeptWalk

        work = making.work(float(mu), digest, fields, sources)
        if begun is not None:
            begun.check_work(work, final)
        walk = KeptWalk.below(target, work, begun, overwrite, partial(_check_as_opened, sources, seen))
    with kept_if_stopped(target, LAYERS_KEPT, how), target:
        check_record(target, begun)
        (record,) = making.going_on(begun).run(rows, digest, {float(mu): target.path}, walk).values()
        _check_as_opened(sources, seen)
        commit_walk(target)
    return record


def _check_as_opened(sources: Sources, seen: Checkpoint) -> None:
    """Raise RunError if an input has changed since it was opened."""
    check_sources_as_opened(sources)
    check_as_opened([seen])


def check_tuned(base: Path, tuned: Path) -> None:
    """Raise InputError unless ``tuned`` is of a kind that can be preconditioned, as far as its files tell."""
    if exists(tuned / PRECONDITIONING):
        raise InputError(
            f"{tuned}: is preconditioned already, as its {PRECONDITIONING} says; subtract it by rule tv, or give the "
            "θ_f that it was made of"
        )
    if is_adapter(tuned):
        from perta_fast.preconditioning.vectors import check_low_rank

        check_low_rank(Adapter.open(tuned, base))


def vector_size(base: Path, tuned: Path) -> int:
    """Bytes on disk that a preconditioned θ_f takes, at most."""
    if is_adapter(tuned):
        return sum(max(4 * entry.count, entry.size) for entry in Adapter.open(tuned, base).checkpoint.tensors.values())
    from perta_fast.tuning.size import tuned_size

    return tuned_size(Checkpoint.open(base))


def given_files(given: Sources, threads: int, progress: Progress) -> dict[str, FileRecord]:
    """Size and hash of the files of a θ_f that is preconditioned. given: it, and the other inputs, as opened.

    Raises RunError if one of these has changed since then.
    """
    config = given.adapter_config
    files = [*given.tuned.files(), *([] if config is None else [config])]
    with Bar(sum(path.stat().st_size for path in files), "hash tuned", progress) as bar:
        hashes = hash_files(files, threads, bar.update)
    check_sources_as_opened(given)
    return describe_files(hashes, given.tuned.path)["files"]


def check_scope(sources: Sources) -> None:
    """Raise InputError if patterns let a run change nothing of a preconditioned θ_f."""
    try:
        check_task_vector(sources)
    except InputError as error:
        raise InputError(
            f"‹only› and ‹leave› let the run change no linear map, and rule {PRECONDITIONED} changes nothing else; "
            "give other patterns, or another rule"
        ) from error

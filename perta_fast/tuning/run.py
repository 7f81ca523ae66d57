"""``tune``: what is wrong with arguments, data and output is said before torch is imported."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.checkpoints.quantised import open_loadable
from perta_fast.data.chat import ChatSettings, parse_date, today
from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields
from perta_fast.data.given_data import Data, Source, taken_out
from perta_fast.data.rows import read_data
from perta_fast.errors import InputError
from perta_fast.files.apart import check_name
from perta_fast.files.disk_space import check_space
from perta_fast.files.new_directory import TUNING_STATE, OutputDirectory, check_replaceable, unfinished_advice
from perta_fast.files.reading import checked_path, exists
from perta_fast.progress import Progress
from perta_fast.records.versions import installed_versions, now
from perta_fast.tuning.prepared import Prepared
from perta_fast.tuning.record import FILE_NAME, Tuning
from perta_fast.tuning.request import DATA, FORGET, RETAIN, Request, sources_here
from perta_fast.tuning.size import tuned_size
from perta_fast.tuning.unfinished import Begun, clear_up, state_of_inputs

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

__all__ = ["FILE_NAME", "Tuning", "resume_tuning", "tune"]

_NEEDED = ("peft", "accelerate")


def tune(
    base: str | Path,
    forget: Data | None = None,
    out: str | Path | None = None,
    *,
    data: Data | None = None,
    retain: Data | None = None,
    retain_kl: float | None = None,
    fields: Fields | None = None,
    download: bool = False,
    full: bool = False,
    rank: int = 16,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: "str | torch.device | None" = None,
    report_to: str | Sequence[str] | None = None,
    callbacks: "Sequence[TrainerCallback]" = (),
    overwrite: bool = False,
    progress: Progress = True,
) -> Tuning:
    """Tune ``base`` on the forget data alone, by transformers and peft: the result is θ_f, as ``unlearn`` takes it.

    base: a checkpoint directory, θ_0. forget: a data file or rows, tokenised and labelled as for ``unlearn``, as are
    fields and download. data: other rows in its place, such as all of them, which makes θ_full.
    out: directory to make, of a LoRA adapter of ``rank`` or, if ``full``, of a checkpoint, both in float32; with the
    record that is returned. The documentation ("Tuning") says what is tuned and why.
    epochs, lr, batch_size: passes over the data, highest rate, samples of a step. None: they follow from the number of
    rows, so that 10 rows are learnt as well as 400. max_length: tokens that a sample is cut to, within the model's own
    limit. system_prompt, date_string: as for ``unlearn``.
    retain, retain_kl: rows on which the model is held, and the weight of KL(base ‖ tuned) on their labelled tokens in
    the loss.
    gradient_checkpointing: compute activations again instead of keeping them. device: None takes CUDA if there is
    one. seed: on the CPU, one seed and one number of threads give the same bytes; torch, NumPy and ``random`` stay
    seeded. report_to: where transformers reports loss and rate, such as wandb or tensorboard. callbacks: for
    transformers' Trainer. overwrite: replace ``out``, start over.

    A run that is stopped keeps its state beside ``out``, at most once a minute: the same call without ``overwrite``, or
    ``resume``, goes on, and on the CPU gives the bytes of an uninterrupted one. With callbacks it is the call alone.

    Memory: the model in the type that it runs in, float32 for float16, and 16 bytes for each parameter of the adapter;
    if ``full``, 16 bytes for each parameter of the model, with retain_kl 20. Disk, if ``full``: 4 bytes for each
    parameter, and up to 24 for the state while there is space.
    Raises InputError for bad input, before the model is loaded where possible, NotFiniteError if a loss is not
    finite, RunError if ``out`` cannot be written, ``errors.Interrupted`` if it is stopped with a state kept.
    """
    if out is None:
        raise InputError("give ‹out›, the directory to make")
    arguments: dict[str, Any] = locals()
    roles = [role for role in (FORGET, DATA, RETAIN) if arguments[role] is not None]
    request = Request.of(arguments, dict.fromkeys(roles, ""))
    request.check()
    check_name(out)
    _check_libraries()
    named, given = taken_out(arguments, roles)
    request = replace(request, sources={role: named[role] for role in roles}).located(download)
    final = Path(os.path.realpath(checked_path(out)))
    begun = None if overwrite else Begun.load(final)
    if begun is not None:
        begun.check_request(final, request)
        overwrite = begun.overwrite
    elif not overwrite and exists(final / TUNING_STATE):
        raise InputError(unfinished_advice(final))
    return _run(request, sources_here(request, given), final, begun, overwrite, callbacks, progress)


def resume_tuning(final: Path, progress: Progress) -> Tuning:
    """Go on with the stopped tuning to ``final``; if its result is complete, only remove its state."""
    begun = Begun.load(final)
    if begun is None:
        clear_up(final)
        return Tuning.read(final)
    _check_libraries()
    return _run(begun.request, sources_here(begun.request, {}), final, begun, begun.overwrite, (), progress)


def _run(
    request: Request,
    sources: Mapping[str, Source],
    final: Path,
    begun: Begun | None,
    overwrite: bool,
    callbacks: "Sequence[TrainerCallback]",
    progress: Progress,
) -> Tuning:
    """Go on with what a stopped run has ``begun``, or begin."""
    if begun is not None and begun.overwrite:
        check_replaceable(final, [FILE_NAME], "the tuning")
    names = [(callback if isinstance(callback, type) else type(callback)).__name__ for callback in callbacks]
    if begun is not None:
        begun.check_callbacks(final, names)
    day = today() if begun is None else parse_date(begun.day)
    chat = ChatSettings.of(request.system_prompt, request.date_string, day)
    inputs = [Path(request.base), *(file for source in sources.values() for file in data_files(source))]
    target = OutputDirectory(final, overwrite=overwrite, inputs=inputs, resume=begun is not None)
    read = {role: read_data(source, request.fields) for role, source in sources.items()}
    checkpoint = open_loadable(request.base)
    known = state_of_inputs(checkpoint, sources, {role: digest for role, (_, digest) in read.items()})
    versions = installed_versions(*_NEEDED)
    if begun is not None:
        begun.check_inputs(final, known, versions)
    elif request.full:
        check_space({final: tuned_size(checkpoint)}, [target.path])
    # Imported late: what is wrong so far was said without waiting for torch.
    from perta_fast.models.loading import choose_device
    from perta_fast.tuning.tuned_model import tune_model

    _check_reporting(request.report_to)
    try:
        device = choose_device(request.device if begun is None else begun.device)
    except InputError as error:
        if begun is None:
            raise
        raise InputError(
            f"{final}: the tuning was begun on {begun.device}, and goes on there alone: {error}; "
            "or start over with ‹overwrite›"
        ) from error
    fresh = Begun(request, known, versions, now(), day.isoformat(), overwrite, str(device), names)
    prepared = Prepared(request, sources, checkpoint, chat, read, callbacks, progress)
    with target, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and the Trainer call transformers by older names
        if begun is not None:
            begun.check_state(target)
            begun = replace(begun, resumed=begun.resumed + 1)
        return tune_model(prepared, target, begun or fresh, device)


def _check_libraries() -> None:
    if None in map(find_spec, _NEEDED):
        raise InputError(f"{' and '.join(_NEEDED)} are needed: pip install 'perta-fast[tune]'")


def _check_reporting(names: Sequence[str]) -> None:
    """Raise InputError unless transformers knows each name, and what it reports to is installed."""
    if not names:
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise InputError(f"‹report_to› is {name!r}; transformers reports to one of {known}")
        if name not in get_available_reporting_integrations():
            raise InputError(f"‹report_to›: {name} is not installed: pip install {name}")

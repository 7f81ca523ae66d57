"""A model loaded for a run, its device and tokenizer, and the samples that it can take."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perta_fast.arguments import AUTO, check_device
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import Quantisation
from perta_fast.data.chat import ChatSettings, Told, told
from perta_fast.data.rows import Row
from perta_fast.data.samples import IGNORED, Sample, encode_rows
from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError
from perta_fast.files.reading import exists, read_json
from perta_fast.memory import available_bytes, format_size
from perta_fast.models.language_part import auto_class, keep_language_part_, reason_of
from perta_fast.models.running_type import first_type, running_type
from perta_fast.models.same_names import named_as_module, stored_under
from perta_fast.models.stored_names import as_stored, load_tensor
from perta_fast.progress import LOGGER, Bar, Progress, draws_bars

_WORTH_A_BAR = 2000  # rows that take about a second to tokenise
_CLOSED = {"local_files_only": True, "trust_remote_code": False}  # no download, no code that came with a model


@dataclass(frozen=True)
class Subject:
    """A module to be measured, its tokenizer, if any, and its origin: a directory, or "live module".

    checkpoint: its weights, as they were opened before they were loaded; None of a live module.
    """

    module: nn.Module
    tokenizer: Any
    origin: str
    checkpoint: Checkpoint | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def length_limit(subject: Subject, max_length: int | None) -> int | None:
    """Tokens that a sample may have: ``max_length`` or the model's own limit, the smaller; None without either."""
    config: Any = getattr(subject.module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context: int | None = getattr(config, "max_position_embeddings", None)
    limits = [int(limit) for limit in (max_length, context) if limit]
    return min(limits, default=None)


def row_samples(subject: Subject, rows: Sequence[Row], max_length: int | None) -> Iterator[list[Sample]]:
    """The samples of each row, cut to the length that the model takes. Raises InputError naming the row."""
    if subject.tokenizer is None:
        raise InputError("a tokenizer is needed to turn rows into tokens; pass tokenizer=")
    return encode_rows(rows, subject.tokenizer, length_limit(subject, max_length) or 1 << 30, _stops(subject))


def samples_for(
    subject: Subject, rows: Sequence[Row] | Sequence[Sample], max_length: int | None, progress: Progress = False
) -> list[Sample]:
    """Tokenise rows; check that the model can take every sample. Raises InputError naming the line or sample."""
    limit = length_limit(subject, None) or 1 << 30
    named: list[tuple[Sample, str]]
    if isinstance(rows[0], Row):
        given: Sequence[Row] = rows  # type: ignore[assignment]
        of_text = not given[0].is_tokenised
        of_rows = row_samples(subject, given, max_length)
        if len(given) >= _WORTH_A_BAR and of_text:
            of_rows = _with_bar(of_rows, len(given), progress)
        named = [(sample, row.where) for row, parts in zip(given, of_rows, strict=True) for sample in parts]
    else:
        of_text = False
        named = [(sample, f"sample {number}") for number, sample in enumerate(rows)]  # type: ignore[misc]
    embeddings = getattr(subject.module, "get_input_embeddings", None)
    vocabulary = None if embeddings is None else len(embeddings().weight)
    for sample, where in named:
        if not of_text:
            _check_sample(sample, where, limit)
        if vocabulary is not None:
            _check_known(sample, where, vocabulary)
    return [sample for sample, _ in named]


def _with_bar(of_rows: Iterable[list[Sample]], count: int, progress: Progress) -> Iterator[list[Sample]]:
    with Bar(count, "tokenising", progress, "sample") as bar:
        for samples in of_rows:
            yield samples
            bar.update(1)


def _stops(subject: Subject) -> set[int]:
    """The tokens that end what the model generates, as its configuration and its generation settings name them."""
    module: Any = subject.module
    named = [getattr(getattr(module, name, None), "eos_token_id", None) for name in ("config", "generation_config")]
    written = Path(subject.origin, "generation_config.json")
    if exists(written):  # a structure without weights has not read it
        settings = read_json(written)
        if not isinstance(settings, dict):
            raise InputError(f"{written}: is not a JSON object")
        named.append(settings.get("eos_token_id"))
    return {token for end in named for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)}


def samples_and_told(
    subject: Subject,
    rows: Sequence[Row] | Sequence[Sample],
    max_length: int | None,
    chat: ChatSettings,
    progress: Progress = False,
) -> tuple[list[Sample], Told]:
    """``samples_for`` with these settings for the chat template, and what it was told. Raises InputError as these do.

    Settings for a chat template that no row can go through are refused.
    """
    if not isinstance(rows[0], Row) or rows[0].is_tokenised:
        chat.refuse_for("the data is tokenised already")
        return samples_for(subject, rows, max_length, progress), Told()
    if subject.tokenizer is not None:
        subject = replace(subject, tokenizer=chat.given_to(subject.tokenizer))
    return samples_for(subject, rows, max_length, progress), told(subject.tokenizer)


def subject_without_weights(path: Path, chat: ChatSettings) -> Subject:
    """The tokenizer and the settings of a checkpoint, for ``row_samples`` alone. Raises InputError if they are bad."""
    from transformers import AutoConfig, AutoTokenizer

    module: Any = nn.Module()
    try:
        module.config = AutoConfig.from_pretrained(path, **_CLOSED)
        tokenizer = AutoTokenizer.from_pretrained(path, **_CLOSED)
    except Exception as error:  # a damaged configuration shows in many ways
        raise InputError(f"{path}: transformers cannot load this model's tokenizer: {reason_of(error)}") from error
    return Subject(module, chat.given_to(tokenizer), str(path.resolve()))


def load_subject(
    path: Path,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    tokenizer: Any = None,
    *,
    structure: nn.Module | None = None,
    text: bool = True,
    progress: Progress = False,
) -> Subject:
    """Load a checkpoint and its tokenizer with transformers. Raises InputError if either cannot be loaded.

    dtype: to run in; None takes the checkpoint's own, or float32 (``running_type``).
    structure: the model without weights, if these are read layer by layer; then no model is loaded. text: whether there
    is text to tokenise; if not, the checkpoint needs no tokenizer. progress: whether transformers may draw its bar.
    """
    from transformers import AutoConfig, AutoTokenizer

    checkpoint = Checkpoint.open(path)  # its errors name what is wrong with the files
    stored = checkpoint.tensors
    quantised = Quantisation.of(path, stored) is not None  # such a model can only be evaluated: names do not matter
    if structure is None and quantised and not _is_indexed(checkpoint):
        raise InputError(
            f"{path}: has no model.safetensors.index.json, without which transformers cannot load a quantised model; "
            "fetch that too"
        )
    chosen = choose_device(device)
    try:
        if structure is None:
            config = AutoConfig.from_pretrained(path, **_CLOSED)
            _refuse_encoder(path, config)
            if dtype is None and not quantised:
                dtype = _type_to_load(checkpoint, config, chosen)
            with bars_of_transformers(progress):
                model, loaded = _from_pretrained(checkpoint, config, dtype)
        if tokenizer is None and text:
            tokenizer = AutoTokenizer.from_pretrained(path, **_CLOSED)
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # a damaged configuration shows in many ways
        raise InputError(f"{path}: transformers cannot load this model: {reason_of(error)}") from error
    if structure is not None:
        return Subject(structure, tokenizer, str(path.resolve()), checkpoint)
    if loaded["missing_keys"]:  # transformers would draw them at random
        raise InputError(f"{path}: lacks tensor {min(loaded['missing_keys'])}, which its config.json calls for")
    keep_language_part_(model)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.named_parameters()}
    if not quantised:
        names = as_stored(model, shapes)
        stored_under(names, named_as_module(checkpoint, model, names))
    return Subject(model.to(chosen), tokenizer, str(path.resolve()), checkpoint)


def _type_to_load(checkpoint: Checkpoint, config: Any, device: torch.device) -> torch.dtype | None:
    """What ``running_type`` puts in place of the checkpoint's own type; None leaves that as it is."""
    own = config.dtype or first_type(checkpoint)
    taken = running_type(own, device)
    if taken == own:
        return None
    needed, free = taken.itemsize * sum(entry.count for entry in checkpoint.tensors.values()), available_bytes()
    if free is not None and needed > free:
        LOGGER.warning(
            "%s: takes %s in %s, in which this processor is fast, and %s are free; stream it, or run it in %s, which "
            "takes less memory and many times as long",
            *(checkpoint.path, format_size(needed), torch_name(taken), format_size(free), torch_name(own)),
        )
    return taken


@contextmanager
def bars_of_transformers(progress: Progress) -> Iterator[None]:
    """Let transformers draw bars only where our own are drawn; afterwards it is as it was before."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    shown, of_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if draws_bars(progress) or not shown:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        if not of_hub:
            disable_progress_bars()


def _refuse_encoder(path: Path, config: Any) -> None:
    if config.is_encoder_decoder:
        raise InputError(
            f"{path}: has an encoder and a decoder; only a model that is a decoder alone can be measured, scored or "
            "tuned (perta apply with ‹rule› tv needs none of that)"
        )


def _from_pretrained(checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None) -> Any:
    """The model, and transformers' account of the loading.

    Transformers knows neither names of wrappers nor shards without an index: it is given the tensors.
    """
    how = {"dtype": dtype or "auto", "output_loading_info": True}
    if _is_indexed(checkpoint) and not any(entry.stored_name for entry in checkpoint.tensors.values()):
        return auto_class(config).from_pretrained(checkpoint.path, **how, **_CLOSED)
    from transformers import GenerationConfig

    with torch.device("meta"):
        kind = type(auto_class(config).from_config(config, trust_remote_code=False))
    state_dict = {name: load_tensor(entry) for name, entry in checkpoint.tensors.items()}
    model, loaded = kind.from_pretrained(None, config=config, state_dict=state_dict, **how)
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)
    if exists(checkpoint.path / "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    return model, loaded


def _is_indexed(checkpoint: Checkpoint) -> bool:
    return checkpoint.index is not None or "model.safetensors" in checkpoint.shards


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; "auto" and None take CUDA if there is one. Raises InputError if it is not available."""
    check_device(device)
    if device in (None, AUTO):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert device is not None
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no CUDA device here")
    try:
        torch.empty(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"‹device› {device!r} cannot be computed on here") from error
    return chosen


def _check_sample(sample: Sample, where: str, limit: int) -> None:
    ids, labels = sample.input_ids, sample.labels
    if len(ids) != len(labels) or any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise InputError(f"{where}: needs one label for each token, the token itself or {IGNORED}")
    if sample.label_count == 0:
        raise InputError(f"{where}: has no token to compute a loss on")
    if len(ids) > limit:
        raise InputError(f"{where}: has {len(ids)} tokens, the model takes {limit}")


def _check_known(sample: Sample, where: str, vocabulary: int) -> None:
    ids = sample.input_ids
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise InputError(
            f"{where}: has tokens from {min(ids)} to {max(ids)}, the model knows those below {vocabulary}; "
            "is this the model's own tokenizer?"
        )

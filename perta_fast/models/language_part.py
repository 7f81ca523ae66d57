"""The part of a multimodal model that text passes through; only this part is loaded, tuned and unlearned."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta_fast.errors import InputError

if TYPE_CHECKING:
    import torch


def auto_class(config: Any, *, whole: bool = False) -> Any:
    """The class of transformers that makes a model of ``config`` with an output head for text.

    whole: with the parts for images or sound, also where transformers has a class without them (Qwen3.5).
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    text = (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM)
    images = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText)
    encoder = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM)  # some models for speech are here too
    order = [images, text, encoder] if whole else [text, images]
    if config.is_encoder_decoder:  # of BART and others, the class for text has the decoder alone
        order.insert(0, encoder)
    return next((maker for mapping, maker in order if type(config) in mapping), AutoModelForCausalLM)


def keep_language_part_(model: Any) -> None:
    """Remove the parts that text does not pass through, such as a vision tower and its projector.

    Then no importance covers them, and unlearning copies them. A model that takes only text is not changed.
    """
    kept = _language_modules(model)
    for part in [module for module in model.modules() if module not in kept]:
        for name, child in part.named_children():
            if kept.isdisjoint(child.modules()):
                setattr(part, name, None)


def parameters_of_other_parts(model: Any) -> list[str]:
    """The parameters that ``keep_language_part_`` would remove, by name."""
    kept = {parameter for module in _language_modules(model) for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if parameter not in kept]


def _language_modules(model: Any) -> "set[torch.nn.Module]":
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is config:
        return set(model.modules())
    kept = {*model.get_decoder().modules(), *model.get_input_embeddings().modules()}
    head = model.get_output_embeddings()
    kept.update([] if head is None else head.modules())
    return kept


def empty_model(
    path: Path, dtype: "torch.dtype | None" = None, default: "torch.dtype | None" = None, *, whole: bool = False
) -> Any:
    """The language part of the model that ``config.json`` in ``path`` describes, without memory for its values.

    dtype: None takes the configuration's own, or ``default`` if it names none. whole: with the parts for images. Raises
    InputError if transformers cannot build it.
    """
    import torch

    with _reading(path) as config:
        with torch.device("meta"):
            model = auto_class(config, whole=whole).from_config(
                config, dtype=dtype or config.dtype or default, trust_remote_code=False
            )
        if not whole:
            keep_language_part_(model)
        return model


def own_type(path: Path, default: "torch.dtype") -> "torch.dtype":
    """The type that ``config.json`` in ``path`` names, or ``default``. Raises InputError as ``empty_model``."""
    with _reading(path) as config:
        dtype: torch.dtype = config.dtype or default
        return dtype


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The configuration in ``path``; what goes wrong with it, or inside the context, is an InputError."""
    from transformers import AutoConfig

    try:
        yield AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a damaged configuration raises many kinds of errors
        raise InputError(f"{path}: transformers cannot build this model: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The first paragraph of an error of transformers in one line, without the list of all its classes."""
    return " ".join(str(error).split("\n\n")[0].split()).split(" Model type should be one of ")[0]


def not_of_language_part(names: list[str], *paths: Path) -> set[str]:
    """Which of these stored tensors have no place in the language part of any model in ``paths``, by its config.json.

    These are tensors that transformers leaves aside when it loads a causal language model, such as layers for
    multi-token prediction and stored rotary frequencies, and the parts for images. Empty if a configuration is missing
    or unknown to transformers: then nothing is known.
    """
    if not all((path / "config.json").is_file() for path in paths):
        return set()
    import torch

    from perta_fast.models.stored_names import loaded_tensors

    outside = set(names)
    for path in dict.fromkeys(paths):
        try:
            model = empty_model(path, default=torch.float32, whole=True)
        except InputError:
            return set()
        keep_language_part_(model)
        outside -= {loaded.stored for loaded in loaded_tensors(model, names)}
    return outside

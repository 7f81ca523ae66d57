"""The part of a multimodal model that text passes through; only this part is loaded, tuned and unlearned."""

from typing import Any


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a model of ``config`` with an output head for text."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def keep_language_part_(model: Any) -> None:
    """Remove the parts that text does not pass through, such as a vision tower and its projector.

    Then no importance covers them, and unlearning copies them. A model that takes only text is not changed.
    """
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is config:
        return
    kept = {*model.get_decoder().modules(), *model.get_input_embeddings().modules()}
    head = model.get_output_embeddings()
    kept.update([] if head is None else head.modules())
    for part in [module for module in model.modules() if module not in kept]:
        for name, child in part.named_children():
            if kept.isdisjoint(child.modules()):
                setattr(part, name, None)

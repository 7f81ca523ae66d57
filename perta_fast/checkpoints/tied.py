"""Tied embeddings: an input embedding and an output head that share one matrix."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.advice import untie_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.configuration import read_config
from perta_fast.errors import InputError
from perta_fast.files.reading import exists

# What the model families call these two matrices.
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_HEADS_OF_PARTS = (".lm_head.weight", ".embed_out.weight")  # as in LLaVA: language_model.lm_head.weight
_HEADS_OF_FAMILIES = {"embed_in.weight": "embed_out.weight", "tok_embeddings.weight": "output.weight"}
_INPUT_EMBEDDINGS = tuple(
    f"{module}.weight"
    for module in ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", ".embeddings")
)


RESIZED = (
    "the vocabulary was resized. With ‹common_rows› the rows that all have are computed, and the others "
    "stay as the model has them"
)


def is_tied_use(name: str) -> bool:
    """Whether a tensor's name is that of an input embedding or an output head."""
    return is_output_head(name) or _is_input_embedding(name)


def is_output_head(name: str) -> bool:
    """Whether a tensor's name is that of an output head, and not of one in a numbered layer."""
    return name in OUTPUT_HEADS or (name.endswith(_HEADS_OF_PARTS) and not _is_in_layer(name))


def _is_input_embedding(name: str) -> bool:
    """Whether a tensor's name is that of an input embedding, and not of one in a numbered layer (as in DeepSeek-V3)."""
    return name.endswith(_INPUT_EMBEDDINGS) and not _is_in_layer(name)


def _is_in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def has_vocabulary_rows(name: str) -> bool:
    """Whether each row of a tensor belongs to a token: of an input embedding, or of an output head and its bias."""
    weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
    return weight in OUTPUT_HEADS or weight.endswith(_HEADS_OF_PARTS) or name.endswith(_INPUT_EMBEDDINGS)


def is_resized(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two shapes of a tensor differ in the number of tokens alone."""
    return has_vocabulary_rows(name) and len(first) > 0 and first[1:] == second[1:] and first != second


def has_rows_of_tokens(name: str, shape: tuple[int, ...], counts: Collection[int]) -> bool:
    """Whether a tensor is an input embedding or an output head: by its name, or as a matrix of as many rows as tokens.

    counts: numbers of tokens, see ``token_counts``. In a numbered layer, where most matrices are, the name decides.
    """
    if has_vocabulary_rows(name) or is_tied_use(name):
        return True
    module = name.rpartition(".")[0].rpartition(".")[2]
    return len(shape) == 2 and shape[0] in counts and (not _is_in_layer(name) or "head" in module or "embed" in module)


def token_counts(model: Checkpoint) -> set[int]:
    """The sizes of vocabularies that config.json names."""
    return counts_in(_settings(model))


def counts_in(settings: Mapping[str, Any]) -> set[int]:
    """The sizes of vocabularies in a configuration, as of both embeddings of Gemma 3n."""
    parts = [part for part in (settings, settings.get("text_config")) if isinstance(part, dict)]
    return {
        value
        for part in parts
        for key, value in part.items()
        if key.startswith("vocab_size") and isinstance(value, int)
    }


def other_uses(model: Checkpoint, tied: bool) -> dict[str, set[str]]:
    """The other names of each tied matrix, by the name of a stored tensor.

    tied: ``ties_embeddings(model)``. A matrix that is stored once is known by the name of its other use too.
    """
    alike = [name for name in model.tensors if (tied and is_tied_use(name)) or is_shared_by_parts(name, model)]
    uses = {name: {other for other in alike if other != name and model.equal(name, other)} for name in alike}
    if tied and alike and not any(map(is_output_head, alike)):
        head = {"lm_head.weight", *(head for end, head in _HEADS_OF_FAMILIES.items() if alike[0].endswith(end))}
        uses = {name: others | head for name, others in uses.items()}
    elif tied and len(alike) == 1:
        uses[alike[0]].add("model.embed_tokens.weight")
    return uses


def tied_partner(name: str, names: Mapping[str, object]) -> str | None:
    """The matrix that ``name`` may be tied with: the input embedding of an output head, or the reverse.

    None if ``names`` has another matrix of the same use: then that one is meant, under another name.
    """
    if not is_tied_use(name):
        return None
    uses = [_is_input_embedding, is_output_head]
    has_same_use, has_other_use = uses if _is_input_embedding(name) else reversed(uses)
    candidates = [other for other in names if has_other_use(other)]
    is_alone = not any(other != name and has_same_use(other) for other in names)
    return candidates[0] if len(candidates) == 1 and is_alone else None


def tied_in(name: str, checkpoint: Checkpoint) -> str | None:
    """The tensor that stands for ``name`` in a checkpoint that stores a tied matrix once.

    None if its config.json says that it ties nothing: then it has no output head, as LlamaModel and classifiers have
    none.
    """
    partner = tied_partner(name, checkpoint.tensors)
    return None if partner is None or _says_that_it_ties(checkpoint) is False else partner


def _says_that_it_ties(checkpoint: Checkpoint) -> bool | None:
    """What config.json says; None if nothing."""
    settings = _settings(checkpoint)
    parts = [settings, settings.get("text_config")]
    said = [part["tie_word_embeddings"] for part in parts if isinstance(part, dict) and "tie_word_embeddings" in part]
    return bool(said[0]) if said else None  # that of the whole model, if it says so


def is_shared_by_parts(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a matrix is one that encoder and decoder of a model share, perhaps with the output head (T5, BART)."""
    is_input = _is_input_embedding(name) or name.rpartition(".")[0].endswith("shared")
    if not (is_input or is_output_head(name)) or not _settings(checkpoint).get("is_encoder_decoder"):
        return False
    return is_input or _says_that_it_ties(checkpoint) is not False


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json holds; nothing if there is none."""
    return read_config(checkpoint.path) or {}


def importance_key(name: str, model: Checkpoint, names: Mapping[str, object]) -> str | None:
    """The name, of an importance's ``names``, that covers the model's tensor ``name``; None if none does."""
    if name in names:
        return name
    other = tied_partner(name, names)
    if other is not None and other not in model.tensors:  # the model stores the tied matrix under one name
        return other
    # A tied pair has one importance, under either name, for both copies on disk: they must stay equal.
    partner = tied_partner(name, model.tensors)
    if partner is not None and partner in names and model.equal(name, partner):
        return partner
    return None


def ties_embeddings(model: Checkpoint) -> bool:
    """Whether ``model`` has one matrix for both uses, stored once or in two equal copies that its config ties."""
    embeddings = [name for name in model.tensors if _is_input_embedding(name)]
    heads = [name for name in model.tensors if is_output_head(name)]
    if embeddings and heads and not (len(embeddings) == len(heads) == 1 and model.equal(embeddings[0], heads[0])):
        return False
    says = _says_that_it_ties(model)
    if says is None:  # what is not said is True: transformers leaves it out if it is
        return exists(model.path / "config.json") or bool(embeddings and heads)
    return says


def refuse_two_matrices(other: Checkpoint, where: object, model: Path | None) -> None:
    """Raise InputError if ``other`` has two different matrices for embedding and head, which the model ties.

    where: what the message calls the model. model: its directory, for the command that gives it two.
    """
    for head in filter(is_output_head, other.tensors):
        embedding = tied_partner(head, other.tensors)
        if embedding is not None and not other.equal(head, embedding):
            raise InputError(
                f"{other.path}: {head} differs from {embedding}, but {where} ties the two; {make_room(model)}"
            )


def make_room(model: Path | None) -> str:
    """Advice to give a tied model two matrices."""
    untie = "give it an output head of its own" if model is None else f"untie that with: {untie_command(model)}"
    return f"model must have two matrices as well: {untie}"

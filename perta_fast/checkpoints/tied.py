"""Tied embeddings: an input embedding and an output head that share one matrix."""

from collections.abc import Container, Mapping

from perta_fast.checkpoints.checkpoint import Checkpoint

# What the model families call these two matrices.
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_INPUT_EMBEDDINGS = tuple(
    f"{module}.weight" for module in ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
)


def tied_partner(name: str, names: Mapping[str, object]) -> str | None:
    """The matrix that ``name`` may be tied with: the input embedding of an output head, or the reverse."""
    candidates: list[str] = []
    if name in OUTPUT_HEADS:
        candidates = [other for other in names if other.endswith(_INPUT_EMBEDDINGS)]
    elif name.endswith(_INPUT_EMBEDDINGS):
        candidates = [other for other in names if other in OUTPUT_HEADS]
    return candidates[0] if len(candidates) == 1 else None


def importance_key(name: str, model: Checkpoint, names: Container[str]) -> str | None:
    """The name, of an importance's ``names``, that covers the model's tensor ``name``; None if none does."""
    if name in names:
        return name
    # A tied pair has one importance, under either name, for both copies on disk: they must stay equal.
    partner = tied_partner(name, model.tensors)
    if partner is not None and partner in names and model.equal(name, partner):
        return partner
    return None

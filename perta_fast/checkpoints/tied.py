"""Input embeddings and output heads that share one matrix."""

from collections.abc import Container, Mapping

from perta_fast.checkpoints.checkpoint import Checkpoint

# Names in the model families of the two matrices that can be one (tied embeddings).
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
INPUT_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)


def tied_partner(name: str, names: Mapping[str, object]) -> str | None:
    """The other matrix that ``name`` may be tied with: the input embedding for an output head, and back."""
    if name in OUTPUT_HEADS:
        candidates = [other for other in names if other.endswith(INPUT_EMBEDDINGS)]
    elif name.endswith(INPUT_EMBEDDINGS):
        candidates = [other for other in names if other in OUTPUT_HEADS]
    else:
        return None
    return candidates[0] if len(candidates) == 1 else None


def importance_key(name: str, model: Checkpoint, names: Container[str]) -> str | None:
    """Which of an importance's ``names`` is that of the model's tensor ``name``; None if it is not covered."""
    if name in names:
        return name
    # A tied pair has one importance, under one of its two names; both copies on disk must stay equal.
    partner = tied_partner(name, model.tensors)
    if partner is not None and partner in names and model.equal(name, partner):
        return partner
    return None

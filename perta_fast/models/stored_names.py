"""From the parameters of a module to the tensors of its checkpoint, which may be named and cut up otherwise."""

import torch
from torch import nn

from perta_fast.errors import InputError


def as_stored(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and cut up ``tensors``, one a parameter and by its name, as ``save_pretrained`` would.

    transformers renames the parameters of some families when it loads a model, and joins all experts of a
    layer into one; saving undoes both. Values only change places, so it serves importances as well. The
    tensors of a module that is not of transformers are returned as they are. What is cut up is copied.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return tensors
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(module, tensors).items()}


def stored_places(module: nn.Module, name: str, shape: torch.Size) -> dict[str, tuple[int, torch.Size]]:
    """The tensors that one parameter of ``shape`` is stored as: where in it each begins, and its shape.

    Raises InputError if one is not stored as it lies in it. Memory: if it is cut up, 16 bytes an element.
    """
    stand_in = torch.empty(shape, device="meta")
    pieces = as_stored(module, {name: stand_in})
    if len(pieces) == 1 and next(iter(pieces.values())) is stand_in:
        return dict.fromkeys(pieces, (0, shape))
    # What was copied is recognised by the numbers of its elements.
    places = torch.arange(shape.numel()).view(shape)
    begins = {}
    for stored, piece in as_stored(module, {name: places}).items():
        first, count = int(piece.view(-1)[0]), piece.numel()
        if not torch.equal(piece.view(-1), places.view(-1)[first : first + count]):
            raise InputError(f"parameter {name} is stored in another order than the module has it in")
        begins[stored] = (first, piece.shape)
    return begins

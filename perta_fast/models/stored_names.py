"""From the parameters of a module to the tensors of its checkpoint, which may have other names, and divide them."""

import torch
from torch import nn

from perta_fast.errors import InputError


def as_stored(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and divide ``tensors``, one for each parameter and by its name, as ``save_pretrained`` would.

    When transformers loads a model, it renames the parameters of some families and joins all experts of a layer into
    one; saving undoes both. No value changes, so importances can be renamed in the same way. The tensors of a module
    that is not of transformers are returned unchanged. Divided tensors are copied.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return tensors
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(module, tensors).items()}


def stored_places(module: nn.Module, name: str, shape: torch.Size) -> dict[str, tuple[int, torch.Size]]:
    """The stored tensors of one parameter of ``shape``: the number of each one's first element, and its shape.

    Raises InputError if the elements are stored in another order. Memory: 16 bytes an element if it is divided.
    """
    stand_in = torch.empty(shape, device="meta")
    tensors = as_stored(module, {name: stand_in})
    if len(tensors) == 1 and next(iter(tensors.values())) is stand_in:
        return dict.fromkeys(tensors, (0, shape))
    numbers = torch.arange(shape.numel()).view(shape)  # as values, they show where each element goes
    begins = {}
    for stored, tensor in as_stored(module, {name: numbers}).items():
        first, count = int(tensor.view(-1)[0]), tensor.numel()
        if not torch.equal(tensor.view(-1), numbers.view(-1)[first : first + count]):
            raise InputError(f"the elements of parameter {name} are stored in another order")
        begins[stored] = (first, tensor.shape)
    return begins

"""From the parameters of a module to the tensors that its checkpoint stores."""

import torch
from torch import nn


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

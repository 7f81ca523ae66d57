"""A live module within wrappers, such as DDP and torch.compile: what they hold is the model."""

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from perta_fast.checkpoints.wrappers import INSIDE
from perta_fast.errors import InputError


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that all wrappers around ``module`` hold; it runs without what they add.

    So gradients are those of the samples of this process alone, and what was compiled runs as it was written. Wrappers
    of modules within it stay. Raises InputError for a module within FSDP1, whose parameters are not the model's.
    """
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise InputError(
            "the module is sharded by FullyShardedDataParallel (FSDP1), which joins its parameters; shard it with "
            "fully_shard (FSDP2), or save it and give the checkpoint"
        )
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif len(held := list(module.named_children())) == 1 and held[0][0] in INSIDE:
            module = held[0][1]
        else:
            return module

"""The operations on tensors. Each has a plain-torch reference and fast paths that are held to it."""

from perta_fast.ops.accumulate import accumulate_, accumulate_many_, accumulate_square_, accumulate_square_many_
from perta_fast.ops.backends import available_backends
from perta_fast.ops.fisher import accumulate_squared_gradients_
from perta_fast.ops.low_rank_subtract import low_rank_subtract_
from perta_fast.ops.rescaled_subtract import rescaled_subtract, rescaled_subtract_, rescaled_subtract_many_

__all__ = [
    "accumulate_",
    "accumulate_many_",
    "accumulate_square_",
    "accumulate_square_many_",
    "accumulate_squared_gradients_",
    "available_backends",
    "low_rank_subtract_",
    "rescaled_subtract",
    "rescaled_subtract_",
    "rescaled_subtract_many_",
]

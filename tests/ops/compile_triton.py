"""Compile every Triton kernel for NVIDIA devices without one, and print what the tests look at as JSON.

Run in a process of its own, because the tests' process interprets the kernels instead.
"""

import itertools
import json
import sys
from collections.abc import Mapping
from typing import Any

import triton
from perta_fast.kernels import accumulate, fisher, low_rank_subtract, rescaled_subtract
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = ("fp32", "bf16", "fp16")


def instructions(
    kernel: object,
    signature: dict[str, str],
    constants: Mapping[str, object],
    arch: int,
    options: Mapping[str, object],
    multiples_of_16: bool = False,
) -> str:
    """The PTX of one kernel, which is assembled too. ``multiples_of_16``: all its arguments are."""
    kinds = signature | dict.fromkeys(constants, "constexpr")
    attributes = {(k,): [["tt.divisibility", 16]] for k in range(len(signature)) if multiples_of_16}
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    assert compiled.asm["cubin"]
    text: str = compiled.asm["ptx"]
    return text


EXACT = {"enable_fp_fusion": False}


def subtraction(
    weights: str, weighted: bool, doubled_power: int, arch: int, low_rank: bool = False, by_ratio: bool = False
) -> str:
    """The PTX of the rescaled subtraction, or of the low-rank one, with float32 importances or a bfloat16 ratio."""
    kinds = {"theta": weights, "left": "fp32", "right": "fp32"}
    if not low_rank:
        kinds = dict.fromkeys(("out", "theta", "tuned", "base"), weights)
    kinds |= {"forget": "fp32", "retain": "bf16" if by_ratio else "fp32"}
    signature = {f"{name}_pointer": f"*{kind}" for name, kind in kinds.items()} | {"n": "i64"}
    if low_rank:
        signature |= {"rank": "i32", "columns": "i32", "scale": "fp32"}
    signature |= {"lam": "fp32", "alpha": "fp32", "threshold": "fp32"}
    constants = {"WEIGHTED": weighted, "BY_RATIO": by_ratio, "MASKED": weighted}
    constants |= {"DOUBLED_POWER": doubled_power, "BLOCK": 1024}
    kernel = low_rank_subtract._low_rank_subtract if low_rank else rescaled_subtract._rescaled_subtract
    return instructions(kernel, signature, constants, arch, EXACT)


def accumulation(gradient: str, squared: bool, arch: int) -> str:
    """The PTX of the accumulation."""
    signature = {"accumulator_pointer": "*fp32", "gradient_pointer": f"*{gradient}", "n": "i64"}
    return instructions(accumulate._accumulate, signature, {"SQUARED": squared, "BLOCK": 1024}, arch, EXACT)


def fisher_tile(types: tuple[str, str], tile: Any, arch: int, *, with_gradient: bool, atomic: bool, odd: bool) -> str:
    """The PTX of the per-sample Fisher with one tile size; ``odd``: of matrices whose sides are odd."""
    signature = {"fisher_pointer": "*fp32", "gradient_pointer": "*fp32"}
    signature |= {"activations_pointer": f"*{types[0]}", "output_gradients_pointer": f"*{types[1]}"}
    signature |= {"blocks_pointer": "*i64", "shares_pointer": "*i64"}
    signature |= {"d_out": "i32", "d_in": "i32", "kept": "i32"}
    constants = {
        "WITH_GRADIENT": with_gradient,
        "WIDENED": types[0] != types[1] or types[0] == "fp32",
        "ATOMIC": atomic,
        "GROUP": fisher.GROUP,
        **tile.kwargs,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return instructions(fisher._fisher, signature, constants, arch, options, multiples_of_16=not odd)


def main() -> int:
    """Compile all; print a list of [name, PTX]."""
    found = []
    for arch in (80, 90):
        settings = [(False, 2), (True, 1), (True, 2), (True, 4)]  # weighted, and twice p, which matters then
        for weights, (weighted, power) in itertools.product(TYPES, settings):
            name = f"rescaled_subtract {weights} weighted={weighted} 2p={power} sm_{arch}"
            found.append((name, subtraction(weights, weighted, power, arch)))
        for power, low_rank in ((1, False), (2, False), (4, False), (4, True)):
            name = f"{'low_rank' if low_rank else 'rescaled'}_subtract bf16 by ratio weighted=True 2p={power} sm_{arch}"
            found.append((name, subtraction("bf16", True, power, arch, low_rank, by_ratio=True)))
        for weights in TYPES:
            name = f"low_rank_subtract {weights} weighted=True sm_{arch}"
            found.append((name, subtraction(weights, True, 4, arch, low_rank=True)))
        for gradient, squared in itertools.product(TYPES, (False, True)):
            found.append((f"accumulate {gradient} squared={squared} sm_{arch}", accumulation(gradient, squared, arch)))
        for types, place in (
            (("bf16", "bf16"), 0),
            (("bf16", "bf16"), -1),
            (("fp16", "fp16"), -1),
            (("fp32", "fp32"), -1),
            (("bf16", "fp32"), 0),
        ):
            tile = (fisher.FLOAT32_TILES if "fp32" in types else fisher.TENSOR_CORE_TILES)[place]
            small = place == 0
            ptx = fisher_tile(types, tile, arch, with_gradient=small, atomic=not small, odd=small)
            found.append((f"fisher {' '.join(types)} {'small' if small else 'large'} sm_{arch}", ptx))
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every Triton kernel for NVIDIA devices without one, and print what the tests look at as JSON.

Run in a process of its own, because the tests' process interprets the kernels instead.
"""

import itertools
import json
import sys

import triton
from perta_fast.kernels import fold, rescaled_subtract
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = ("fp32", "bf16", "fp16")


def instructions(kernel: object, signature: dict[str, str], constants: dict[str, object], arch: int) -> str:
    """The PTX of one kernel."""
    kinds = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, kinds, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
    text: str = compiled.asm["ptx"]
    return text


def subtraction(weights: str, importance: str, weighted: bool, doubled_power: int, arch: int) -> str:
    """The PTX of the rescaled subtraction."""
    names = ("theta", "tuned", "base", "forget", "retain")
    kinds = (weights, weights, weights, importance, importance)
    signature = {f"{name}_pointer": f"*{kind}" for name, kind in zip(names, kinds, strict=True)}
    signature |= {"n": "i64", "lam": "fp32", "alpha": "fp32", "threshold": "fp32"}
    constants = {"WEIGHTED": weighted, "MASKED": weighted, "DOUBLED_POWER": doubled_power, "BLOCK": 1024}
    return instructions(rescaled_subtract._rescaled_subtract, signature, constants, arch)


def folding(gradient: str, squared: bool, arch: int) -> str:
    """The PTX of the fold."""
    signature = {"accumulator_pointer": "*fp32", "gradient_pointer": f"*{gradient}", "n": "i64"}
    return instructions(fold._fold, signature, {"SQUARED": squared, "BLOCK": 1024}, arch)


def main() -> int:
    """Compile all; print a list of [name, PTX]."""
    found = []
    for arch in (80, 90):
        for weights, weighted, power in itertools.product(TYPES, (False, True), (1, 2, 4)):
            name = f"subtract {weights} weighted={weighted} 2p={power} sm_{arch}"
            found.append((name, subtraction(weights, "fp32", weighted, power, arch)))
        for gradient, squared in itertools.product(TYPES, (False, True)):
            found.append((f"fold {gradient} squared={squared} sm_{arch}", folding(gradient, squared, arch)))
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

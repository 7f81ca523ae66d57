"""The Triton kernels compile for NVIDIA devices: into the reference's arithmetic, or tensor-core products."""

import json
import os
import re
import sys

import pytest

from tests.support.children import run_child

pytest.importorskip("triton")

ARITHMETIC = re.compile(r"^\s*(?:@%p\d+ )?((?:fma|mul|add|sub|div|sqrt)\S*\.f\S*)", re.MULTILINE)
PRODUCT = re.compile(r"^\s*(wgmma\.mma_async\S*|mma\.sync\S*)", re.MULTILINE)


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    """PTX by name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_child([sys.executable, "-m", "tests.ops.compile_triton"], env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_no_contraction_and_no_flushing(kernels: dict[str, str]) -> None:
    exact = {name: ptx for name, ptx in kernels.items() if not name.startswith("fisher")}
    assert len(exact) == 50
    for name, ptx in exact.items():
        arithmetic = set(ARITHMETIC.findall(ptx))
        assert arithmetic, name
        # fma would round once where the formula rounds twice; ftz would lose denormals; approx is not IEEE.
        assert not [op for op in arithmetic if "fma" in op or "ftz" in op or "approx" in op], (name, arithmetic)
        if "weighted=True" in name:
            assert "div.rn.f32" in arithmetic, name


def test_products_of_16_bit_types_run_on_tensor_cores(kernels: dict[str, str]) -> None:
    fisher = {name: ptx for name, ptx in kernels.items() if name.startswith("fisher")}
    assert len(fisher) == 10
    for name, ptx in fisher.items():
        products = set(PRODUCT.findall(ptx))
        if "fp32" in name:  # exact products instead: no tf32
            assert not products, name
            assert "fma.rn.f32" in ARITHMETIC.findall(ptx), name
            continue
        stored = "bf16" if "bf16" in name else "f16"
        if "large" in name and "sm_90" in name:
            assert products == {f"wgmma.mma_async.sync.aligned.m64n256k16.f32.{stored}.{stored}"}, name
        else:
            assert products == {f"mma.sync.aligned.m16n8k16.row.col.f32.{stored}.{stored}.f32"}, name
        if "large" in name:
            assert "cp.async.cg.shared.global" in ptx, name  # 16-byte loads that run ahead

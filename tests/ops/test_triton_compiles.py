"""The Triton kernels compile for NVIDIA devices, into instructions that keep the reference's bits."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ARITHMETIC = re.compile(r"^\s*(?:@%p\d+ )?((?:fma|mul|add|sub|div|sqrt)\S*\.f\S*)", re.MULTILINE)


def test_compiles_without_contraction_or_flushing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_triton"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 48
    for name, ptx in kernels:
        arithmetic = set(ARITHMETIC.findall(ptx))
        assert arithmetic, name
        # fma would round once where the formula rounds twice; ftz would lose denormals; approx is not IEEE.
        assert not [op for op in arithmetic if "fma" in op or "ftz" in op or "approx" in op], (name, arithmetic)
        if "weighted=True" in name:
            assert "div.rn.f32" in arithmetic, name

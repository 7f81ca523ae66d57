"""What the tests of several operations share."""

from collections.abc import Iterator

import pytest

from perta_fast import compiled


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of kernels that this processor runs, in turn."""
    module = compiled.kernels()
    if request.param not in module.build_info()["instruction_sets"]:
        pytest.skip(f"this processor or build has no {request.param}")
    module.select_instruction_set(request.param)
    yield request.param
    module.select_instruction_set("best")

"""A fixture: the library that injects faults, compiled once."""

import pytest

from tests.crash.shim import Shim


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """Injects faults into the file calls of a child process."""
    return Shim.build(tmp_path_factory.mktemp("shim"))

"""Stored elements as float32."""

import numpy as np
import pytest
import torch

from perta_fast.arrays import widen


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_every_element_widens_as_in_torch(name: str, dtype: torch.dtype) -> None:
    stored = np.arange(1 << 16, dtype=np.uint16)
    found = np.empty(stored.size, np.float32)
    widen(memoryview(stored).cast("B"), name, found)
    expected = torch.from_numpy(stored.copy()).view(dtype).float().numpy()
    np.testing.assert_array_equal(found, expected)
    finite = np.isfinite(expected)
    assert (found[finite].view(np.uint32) == expected[finite].view(np.uint32)).all()  # the sign of 0 too

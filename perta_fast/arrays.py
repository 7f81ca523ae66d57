"""NumPy's arrays in annotations. NumPy itself is imported in the functions that make arrays: that takes 0.1 s."""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

ByteArray: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


def widen(data: memoryview, dtype: str, out: FloatArray) -> None:
    """Write stored elements of type ``dtype``, BF16 or F16, to ``out``, which has as many."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        np.left_shift(np.frombuffer(data, np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[:] = np.frombuffer(data, np.float16)

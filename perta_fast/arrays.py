"""NumPy's arrays in annotations. NumPy itself is imported in the functions that make arrays: that takes 0.1 s."""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

ByteArray: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

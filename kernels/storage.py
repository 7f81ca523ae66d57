"""value = float32(stored), stored = round(value), with the same bits on every device and in the interpreter.

bfloat16 goes through its bits: a cast would leave the rounding to the device, and the interpreter truncates.
Assumes blocks that are in registers already. Moves no data; a few integer operations an element for bfloat16, one
conversion for float16.
"""

import triton
import triton.language as tl


@triton.jit
def as_float(stored):  # type: ignore[no-untyped-def]
    """The float32 value of a loaded block."""
    if stored.dtype == tl.bfloat16:
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 ``value`` as ``dtype``, to nearest even; a NaN stays one."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        # The sum may carry into the sign only for a NaN, and NaNs are replaced below.
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(value != value, 0x7FC0, nearest)
        return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)

"""fisher += sum over samples of (delta_n^T a_n)^2 in Triton, on tensor cores.

One program makes one tile of the result. It multiplies block after block of tokens into float32 registers. Where a
sample ends, it adds the square of what they hold to a second set of registers, which it stores once, at the end. The
blocks of all samples are one loop, so loads run ahead over the end of a sample. Where there are too few tiles to fill
the device, several programs share one, each with samples of its own, and add to it atomically, in no fixed order.

Assumes dense arrays aligned to their elements, of any size; the edges of tiles and the last block of a sample are
masked. Inputs in one 16-bit type are multiplied as they are, all others in float32 (IEEE, no tensor cores).
Bytes: 8 an element of the result and program; each input once for each tile that it is part of.
FLOPs: 2 a token and element, as in an ordinary backward, and 2 a sample and element for the square.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from perta_fast.kernels.device import current_device, current_stream, processors
from perta_fast.kernels.storage import as_float
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

GROUP = 8  # rows of tiles that are walked together, so that what they share stays in the second-level cache


@triton.jit(do_not_specialize=["kept"])
def _fisher(  # type: ignore[no-untyped-def]
    fisher_pointer,
    gradient_pointer,
    activations_pointer,
    output_gradients_pointer,
    blocks_pointer,  # first row of each block of tokens, and the row after its sample's last
    shares_pointer,  # the programs of one tile take blocks [shares[k], shares[k + 1])
    d_out,
    d_in,
    kept,  # 0: compute, but write nothing
    WITH_GRADIENT: tl.constexpr,
    WIDENED: tl.constexpr,
    ATOMIC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    across = tl.cdiv(d_in, BLOCK_IN)
    group, place = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    height = tl.minimum(tl.cdiv(d_out, BLOCK_OUT) - group * GROUP, GROUP)
    outs = (group * GROUP + place % height) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ins = (place // height) * BLOCK_IN + tl.arange(0, BLOCK_IN)

    product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    squares = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    sums = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    first = tl.load(shares_pointer + tl.program_id(1))
    last = tl.load(shares_pointer + tl.program_id(1) + 1)
    for block in range(first, last):
        row = tl.load(blocks_pointer + 2 * block)
        end = tl.load(blocks_pointer + 2 * block + 1)
        rows = row + tl.arange(0, BLOCK_TOKENS)[:, None]
        delta = tl.load(
            output_gradients_pointer + rows * d_out + outs[None, :],
            mask=(rows < end) & (outs < d_out)[None, :],
            other=0.0,
        )
        a = tl.load(
            activations_pointer + rows * d_in + ins[None, :], mask=(rows < end) & (ins < d_in)[None, :], other=0.0
        )
        if WIDENED:
            delta, a = as_float(delta), as_float(a)
        product = tl.dot(tl.trans(delta), a, product, input_precision="ieee")
        if row + BLOCK_TOKENS >= end:
            squares += product * product
            if WITH_GRADIENT:
                sums += product
            product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)

    places = outs.to(tl.int64)[:, None] * d_in + ins[None, :]
    inside = (outs < d_out * kept)[:, None] & (ins < d_in)[None, :]
    _add(fisher_pointer + places, squares, inside, ATOMIC)
    if WITH_GRADIENT:
        _add(gradient_pointer + places, sums, inside, ATOMIC)


@triton.jit
def _add(pointers, values, inside, ATOMIC: tl.constexpr):  # type: ignore[no-untyped-def]
    if ATOMIC:
        tl.atomic_add(pointers, values, mask=inside, sem="relaxed")
    else:
        tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + values, mask=inside)


def _tile(out: int, in_: int, tokens: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_OUT": out, "BLOCK_IN": in_, "BLOCK_TOKENS": tokens}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# Smallest first. At 128 x 256 the two sets of registers are all that a multiprocessor has and some squares are
# spilled, but those are touched once a sample only, and such tiles load the least a FLOP.
TENSOR_CORE_TILES = (
    _tile(32, 64, 64, 4, 5),
    _tile(64, 64, 64, 4, 5),
    _tile(64, 128, 64, 4, 5),
    _tile(128, 64, 64, 4, 5),
    _tile(128, 128, 64, 8, 5),
    _tile(128, 256, 64, 8, 5),
)
FLOAT32_TILES = (_tile(32, 32, 32, 4, 3), _tile(64, 64, 16, 4, 3), _tile(128, 64, 16, 8, 3))
INTERPRETED_TILE = _tile(16, 32, 16, 4, 1)

UNFIT = (OutOfResources, PTXASError)  # what a tile raises that is too large for the device
Rows = tuple[tuple[int, int], ...]


def fisher_triton_(
    fisher: Tensor, gradient: Tensor | None, activations: Tensor, output_gradients: Tensor, samples: Tensor
) -> None:
    """Launch on checked arguments; see ``perta_fast.ops.accumulate_squared_gradients_``.

    activations: (M, d_in), output_gradients: (M, d_out). samples: (N, 2) int64 on the CPU; sample n has the
    rows from samples[n, 0] up to samples[n, 1]. No other row is read.

    The first call with new shapes compiles and times a few tiles, writing nothing meanwhile. Memory on the
    device: 16 bytes a block of tokens.
    """
    rows: Rows = tuple((begin, end) for begin, end in samples.tolist() if begin < end)
    if not rows or not fisher.numel():
        return
    launch = partial(_launch, fisher, gradient, activations, output_gradients, rows)
    with current_device(fisher):
        if triton.knobs.runtime.interpret:
            launch(INTERPRETED_TILE)
        else:
            launch(_fastest_tile(fisher, gradient, activations, output_gradients, rows, launch))


def _launch(
    fisher: Tensor,
    gradient: Tensor | None,
    activations: Tensor,
    output_gradients: Tensor,
    rows: Rows,
    tile: triton.Config,
    programs: int | None = None,
    kept: bool = True,
) -> None:
    """Run with one tile size; ``programs`` share a tile (None: as many as fill the device)."""
    (d_out, d_in), block = fisher.shape, tile.kwargs
    tiles = triton.cdiv(d_out, block["BLOCK_OUT"]) * triton.cdiv(d_in, block["BLOCK_IN"])
    if programs is None:
        programs = programs_a_tile(tiles, len(rows), processors(fisher.device))
    blocks, shares = _plan(rows, block["BLOCK_TOKENS"], programs, fisher.device, current_stream(fisher.device))
    one_type = activations.dtype == output_gradients.dtype != torch.float32
    _fisher[(tiles, programs)](
        fisher,
        fisher if gradient is None else gradient,
        activations,
        output_gradients,
        blocks,
        shares,
        d_out,
        d_in,
        int(kept),
        WITH_GRADIENT=gradient is not None,
        WIDENED=not one_type or triton.knobs.runtime.interpret,  # the interpreter cannot multiply bfloat16
        ATOMIC=programs > 1,
        GROUP=GROUP,
        enable_fp_fusion=True,
        **tile.all_kwargs(),
    )


def programs_a_tile(tiles: int, samples: int, multiprocessors: int) -> int:
    """Over how many programs to divide the samples: the fewest that keep nine tenths of the device busy."""

    def busy(programs: int) -> float:
        rounds: int = triton.cdiv(tiles * programs, multiprocessors)
        return tiles * programs / (rounds * multiprocessors)

    choices = range(1, max(1, min(samples, 4 * multiprocessors // tiles)) + 1)
    return next((programs for programs in choices if busy(programs) >= 0.9), max(choices, key=busy))


@lru_cache(maxsize=64)  # all layers share the samples of a batch
def _plan(rows: Rows, block: int, programs: int, device: torch.device, stream: Hashable) -> tuple[Tensor, Tensor]:
    """The kernel's two tables; kept for one stream, because they are copied and freed in its order."""
    blocks = [(row, end) for begin, end in rows for row in range(begin, end, block)]
    # A sample must not be divided: its sum is squared as a whole.
    borders = [0, *accumulate(triton.cdiv(end - begin, block) for begin, end in rows)]
    shares = [borders[bisect_left(borders, k * len(blocks) / programs)] for k in range(programs + 1)]
    table = torch.tensor([*chain.from_iterable(blocks), *shares], pin_memory=device.type != "cpu")
    table = table.to(device, non_blocking=True)
    return table[: 2 * len(blocks)], table[2 * len(blocks) :]


_fastest: dict[Hashable, triton.Config] = {}


def _fastest_tile(
    fisher: Tensor,
    gradient: Tensor | None,
    activations: Tensor,
    output_gradients: Tensor,
    rows: Rows,
    launch: Callable[..., None],
) -> triton.Config:
    """The tile that was fastest for such arguments on this device.

    triton.autotune would have to copy the accumulators, which may take gigabytes; here launches write nothing.
    """
    (d_out, d_in), types = fisher.shape, (activations.dtype, output_gradients.dtype)
    tokens = sum(end - begin for begin, end in rows) // len(rows)
    key = (fisher.device, d_out, d_in, *types, gradient is None, tokens.bit_length())
    if key not in _fastest:
        tiles = TENSOR_CORE_TILES if types[0] == types[1] != torch.float32 else FLOAT32_TILES
        fitting = [
            tile for tile in tiles if tile.kwargs["BLOCK_OUT"] < 2 * d_out and tile.kwargs["BLOCK_IN"] < 2 * d_in
        ]
        _fastest[key] = min(
            fitting or tiles[:1], key=lambda tile: _milliseconds(partial(launch, tile, kept=False), fisher.device)
        )
    return _fastest[key]


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    try:
        run()  # compiles
    except UNFIT:
        return math.inf
    module = torch.get_device_module(device)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(3):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))

"""By what two importances know that they were taken at the same weights, wherever these lie and however sharded."""

from contextlib import ExitStack, closing
from pathlib import Path

from blake3 import blake3

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.files.reading import PositionReader

BLOCKS, BLOCK_BYTES = 16, 4096  # read of each tensor


def weights_hash(checkpoint: Checkpoint) -> str:
    """BLAKE3 of names, types and shapes of all tensors, and of blocks of bytes of each, evenly spread.

    A tensor of up to 64 KiB is read whole. Of a larger one 16 blocks of 4 KiB are read, the first and the last among
    them: tuning and editing change whole matrices. Raises RunError if a file cannot be read.
    """
    digest = blake3()
    buffer = memoryview(bytearray(BLOCKS * BLOCK_BYTES))
    with ExitStack() as opened:
        readers: dict[Path, PositionReader] = {}
        for name, entry in sorted(checkpoint.tensors.items()):
            if entry.path not in readers:
                readers[entry.path] = opened.enter_context(closing(PositionReader(entry.path)))
            reader, end = readers[entry.path], 0
            for begin, size in _blocks(entry.size):
                reader.read_into(buffer[end : end + size], entry.begin + begin, f"tensor {name}")
                end += size
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\n".encode())
            digest.update(buffer[:end])
    return digest.hexdigest()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Begin and size of the blocks of a tensor of ``size`` bytes."""
    if size <= BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    return [(k * (size - BLOCK_BYTES) // (BLOCKS - 1), BLOCK_BYTES) for k in range(BLOCKS)]

"""BLAKE3 hashes of whole files, many files at a time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from perta_fast.errors import RunError
from perta_fast.files.reading import drop_pages, regular_file

_STEP = 8 << 20  # bytes read at a time, and so the memory that one file takes


def hash_file(path: Path, advance: Callable[[int], None] | None = None, drop_cache: bool = False) -> str:
    """BLAKE3 of a file as 64 hexadecimal digits, as the command ``b3sum`` prints it.

    advance: called with the number of bytes after each read. drop_cache: keep the file out of the page cache.
    Raises RunError if the file cannot be read.
    """
    digest = blake3()
    buffer, done = memoryview(bytearray(_STEP)), 0
    try:
        with open(path, "rb", buffering=0, opener=regular_file) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if drop_cache:  # not the pages that the system has read ahead
                    drop_pages(file.fileno(), done, count)
                done += count
                if advance is not None:
                    advance(count)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def hash_files(
    paths: Iterable[Path], threads: int, advance: Callable[[int], None] | None = None, drop_cache: bool = False
) -> dict[Path, str]:
    """``hash_file`` of each file, up to ``threads`` at a time."""
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda path: hash_file(path, advance, drop_cache), unique)
        return dict(zip(unique, hashes, strict=True))

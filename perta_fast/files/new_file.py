"""One file that a command writes: checked before the work, written whole or not at all."""

from pathlib import Path

from perta_fast.errors import InputError, RunError
from perta_fast.files.durable import remove, write_file
from perta_fast.files.new_directory import partial_path
from perta_fast.files.reading import checked_path


def check_output_file(path: Path, endings: tuple[str, ...], *, overwrite: bool) -> None:
    """Raise InputError if a command must not write ``path``.

    Its name must have one of the ``endings``: nobody replaces weights by mistake.
    """
    checked_path(path)
    advice = f"name a file that ends in {' or '.join(endings)}"
    if path.suffix not in endings:
        raise InputError(f"{path}: {advice}")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; {advice}")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; choose another file or pass --overwrite")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: is not a directory")


def write_output_file(path: Path, content: bytes) -> None:
    """Write or replace ``path``. Raises RunError, and keeps the old file, if that fails."""
    beside = partial_path(path)
    try:
        write_file(path, content, beside)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        remove(beside)

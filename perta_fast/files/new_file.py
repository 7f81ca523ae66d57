"""A single file that a command writes: checked before the work, written whole or not at all."""

from pathlib import Path

from perta_fast.errors import InputError, RunError
from perta_fast.files.durable import remove, write_file
from perta_fast.files.new_directory import partial_path


def check_output_file(path: Path, endings: tuple[str, ...], *, overwrite: bool) -> None:
    """Raise InputError if a file must not be written to ``path``.

    endings: one of these its name must have, so that no weights are replaced by mistake.
    """
    if path.suffix not in endings:
        raise InputError(f"{path}: name a file that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file that ends in {' or '.join(endings)}")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; choose another file or pass --overwrite")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: is not a directory")


def write_output_file(path: Path, content: bytes) -> None:
    """Write or replace ``path``. Raises RunError, with what was there still there, if that cannot be done."""
    beside = partial_path(path)
    try:
        write_file(path, content, beside)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        remove(beside)

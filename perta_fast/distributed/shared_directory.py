"""Whether all ranks see one directory, as they must to fill it together."""

import time
from pathlib import Path

from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.durable import write_file

_TIMEOUT = 30  # seconds that a network file system may take to show a new file


def check_shared(directory: Path, ranks: Ranks) -> None:
    """Raise InputError on all ranks unless each sees a file that the first one writes to ``directory``."""
    if ranks.world == 1:
        return
    import secrets  # here: it loads OpenSSL, which one process alone does not need

    # A name that nobody has looked for before: file systems also remember which files do not exist.
    token = directory / f"seen-by-all-{ranks.share(secrets.token_hex(8))}"
    with ranks.together("the output directory"):
        if ranks.first:
            write_file(token, b"")
    with ranks.together("the output directory"):
        latest = time.monotonic() + _TIMEOUT
        while not token.exists():
            if time.monotonic() > latest:
                raise InputError(f"{directory}: is not seen by all processes; they must share its file system")
            time.sleep(0.1)
    with ranks.together("the output directory"):
        if ranks.first:
            token.unlink()

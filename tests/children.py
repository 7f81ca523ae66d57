"""``perta`` in a process of its own, with its surroundings changed first."""

import subprocess
import sys
from pathlib import Path

_MAIN = "\nimport sys\nfrom perta_fast.cli import main\nsys.exit(main(sys.argv[1:]))\n"

_SIGNAL_AT = """
import os, signal
from perta_fast import {module}

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
original = {module}.{function}
sent = []

def stopped(*arguments, **settings):
    result = original(*arguments, **settings) if {after} else None
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.{signal})
    return result if {after} else original(*arguments, **settings)

{module}.{function} = stopped
"""


def perta(*arguments: object, setup: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``perta`` with ``arguments`` after the Python statements of ``setup``."""
    command = [sys.executable, "-c", setup + _MAIN, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def signal_at(signal: str, place: str, after: bool = False) -> str:
    """A ``setup`` that sends ``signal`` when ``place`` (module.function) is first called, or ``after`` that."""
    module, _, function = place.partition(".")
    return _SIGNAL_AT.format(signal=signal, module=module, function=function, after=after)

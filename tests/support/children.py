"""``perta`` in a process of its own, with its surroundings changed first."""

import os
import subprocess
import sys
from collections.abc import Mapping

_MAIN = "\nimport sys\nfrom perta_fast.cli import main\nsys.exit(main(sys.argv[1:]))\n"

_SIGNAL_AT = """
import os, signal, time
from perta_fast.{package} import {module}

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
original = {module}.{function}
calls = []

def stopped(*arguments, **settings):
    first = not calls
    calls.append(arguments)
    if first and not {after}:
        os.kill(os.getpid(), signal.{signal})
        time.sleep(1)  # in a worker: the main thread must see it first, on a busy machine too
    result = original(*arguments, **settings)
    if first and {after}:
        os.kill(os.getpid(), signal.{signal})
    return result

{module}.{function} = stopped
"""


def perta(
    *arguments: object, setup: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``perta`` with ``arguments`` after the Python statements of ``setup``, with more variables set."""
    command = [sys.executable, "-c", setup + _MAIN, *map(str, arguments)]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}  # for torch, as the fixture one_thread
    settings |= environment or {}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)


def signal_at(signal: str, place: str, after: bool = False) -> str:
    """A ``setup`` that sends ``signal`` when ``place`` is first called, or ``after`` that.

    place: room, module and function, as ``files.new_directory.move``.
    """
    package, module, function = place.split(".")
    return _SIGNAL_AT.format(signal=signal, package=package, module=module, function=function, after=after)

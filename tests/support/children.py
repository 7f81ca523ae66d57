"""Child processes of the tests, and ``perta`` in one whose surroundings are changed first."""

import atexit
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.forked import ForkedPython
from tests.support.patience import HUNG

_MAIN = "\nimport sys\nfrom perta_fast.cli import main\nsys.exit(main(sys.argv[1:]))\n"

_SIGNAL_AT = """
import os, signal, threading
from concurrent.futures import ThreadPoolExecutor
from perta_fast.{package} import {module}

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
signal.signal(signal.SIGUSR1, lambda *_: None)
original = {module}.{function}
close_pool = ThreadPoolExecutor.shutdown
calls = []
stopping = threading.Event()

def closing(pool, *arguments, **settings):
    stopping.set()
    return close_pool(pool, *arguments, **settings)

def stopped(*arguments, **settings):
    chosen = len(calls) == {earlier}
    calls.append(arguments)
    if chosen and not {after}:
        stopping.clear()
        os.kill(os.getpid(), signal.{signal})
        if threading.current_thread() is not threading.main_thread():
            # The main thread has the signal, and closes the pool once all are to stop. If it began to wait for a lock
            # just before, it looks for signals only when the next one comes: one that does nothing.
            while not stopping.wait(1):
                os.kill(os.getpid(), signal.SIGUSR1)
    result = original(*arguments, **settings)
    if chosen and {after}:
        os.kill(os.getpid(), signal.{signal})
    return result

ThreadPoolExecutor.shutdown = closing
{module}.{function} = stopped
"""


def run_child(command: Sequence[object], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run ``command`` and capture its output as text. settings: of ``subprocess.run``."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HUNG, **settings)


def perta(
    *arguments: object, setup: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``perta`` with ``arguments`` after the Python statements of ``setup``, in a fork that has torch already.

    environment: variables beside those of this process, for a process that starts anew.
    """
    program = setup + _MAIN
    if environment is None:
        return _forked().run("-c", program, *arguments, cwd=Path.cwd())
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return run_child([sys.executable, "-c", program, *arguments], env=variables)


@cache
def _forked() -> ForkedPython:
    forked = ForkedPython().__enter__()
    atexit.register(forked.__exit__, None, None, None)
    return forked


def signal_at(signal: str, call: str, after: bool = False, earlier: int = 0) -> str:
    """A ``setup`` that sends ``signal`` when ``call`` is made, or ``after`` that, once it was made ``earlier`` times.

    call: room, module and function, as ``files.new_directory.move``.
    """
    package, module, function = call.rsplit(".", 2)
    names = {"package": package, "module": module, "function": function}
    return _SIGNAL_AT.format(signal=signal, after=after, earlier=earlier, **names)

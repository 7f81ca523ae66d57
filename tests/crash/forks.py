"""``perta`` under faults in forks of one process: imports take seconds, and are done once.

    with Forks(shim.library, ["perta_fast.cli"]) as forks:
        forks.perta("resume", out, faults=Faults("/watched/", then="kill before", at=7))

The process that is forked has computed nothing, so a child does what a new process does.
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType

from tests.crash.shim import CHANGES, Faults, Point, points
from tests.support.patience import HUNG


class Forks:
    """The process that is forked. imported: modules; setup: Python statements that it runs after these imports.

    It has one child at a time: threads that call ``perta`` wait for each other.
    """

    def __init__(self, library: Path, imported: Sequence[str], setup: str = "") -> None:
        self._library, self._imported, self._setup = library, imported, setup
        self._lock = threading.Lock()

    def __enter__(self) -> "Forks":
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.forks", self._library, self._setup, *self._imported],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"LD_PRELOAD": str(self._library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._server:  # closes its input, which ends it
            pass

    def perta(self, *arguments: object, faults: Faults | None = None) -> subprocess.CompletedProcess[str]:
        """As ``Shim.perta``. faults: None injects none."""
        command = list(map(str, arguments))
        with self._lock, tempfile.TemporaryDirectory() as folder:
            order = {
                "folder": folder,
                "arguments": command,
                "environment": {} if faults is None else faults.environment(self._library),
            }
            assert self._server.stdin is not None and self._server.stdout is not None
            print(json.dumps(order), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
            assert answer, "the process that is forked has ended"
            status = int(answer)
            output, errors = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, status, output, errors)

    def count(self, *arguments: object, path: str, log: Path, kinds: tuple[str, ...] = CHANGES) -> list[Point]:
        """The calls that ``perta`` makes with ``arguments`` without faults. log: a new file for them."""
        done = self.perta(*arguments, faults=Faults(path, kinds, log=log))
        assert done.returncode == 0, done.stderr
        return points(log)


def _serve(library: str, setup: str, *imported: str) -> None:
    signal.alarm(HUNG)  # ends this process, which the tests then see
    for name in imported:
        import_module(name)
    exec(setup, {})
    gc.collect()
    gc.freeze()
    signal.alarm(0)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_work(library, **json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


def _work(library: str, folder: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Run ``perta`` in the child; returns its exit status."""
    signal.alarm(HUNG)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o666), number)
    from perta_fast.cli import main

    os.environ.update(environment)
    ctypes.CDLL(library).read_plan()
    try:
        status = main(arguments)
    except SystemExit as error:  # from argparse
        status = int(str(error.code))
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve(*sys.argv[1:])

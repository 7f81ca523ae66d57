"""``perta`` under faults in forks of one process: imports take seconds, and are done once.

    with Forks(shim.library, ["perta_fast.cli"]) as forks:
        forks.perta("resume", out, faults=Faults("/watched/", then="kill before", at=7))

The process that is forked has computed nothing, so a child does what a new process does.
"""

import contextlib
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

    def perta(
        self, *arguments: object, faults: Faults | None = None, dots: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As ``Shim.perta``. faults: None injects none.

        dots: the child writes a dot for each file that it opens, moves or removes and goes on; it is killed when there
        are so many. The dots are at the end of its output.
        """
        command = list(map(str, arguments))
        with self._lock, tempfile.TemporaryDirectory() as folder:
            order = {
                "folder": folder,
                "arguments": command,
                "environment": {} if faults is None else faults.environment(self._library),
                "dotted": dots is not None,
            }
            if dots is not None:
                os.mkfifo(Path(folder, "dots"))
            assert self._server.stdin is not None
            print(json.dumps(order), file=self._server.stdin, flush=True)
            child = int(self._answer())
            written = b"" if dots is None else _killed_after(dots, child, Path(folder, "dots"))
            status = int(self._answer())
            output, errors = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, status, output + written.decode(), errors)

    def _answer(self) -> str:
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        assert answer, "the process that is forked has ended"
        return answer

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
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


def _killed_after(dots: int, child: int, fifo: Path) -> bytes:
    """Read so many dots of ``child``, kill it, and return what it wrote. It may end before."""
    process = os.pidfd_open(child)  # it waits for a reader
    try:
        with open(fifo, "rb", buffering=0) as pipe:
            written = b""
            while len(written) < dots and (read := pipe.read(dots - len(written))):
                written += read
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            return written + pipe.readall()
    finally:
        os.close(process)


def _work(library: str, folder: str, arguments: list[str], environment: dict[str, str], dotted: bool) -> int:
    """Run ``perta`` in the child; returns its exit status."""
    signal.alarm(HUNG)
    if dotted:
        pipe = os.open(Path(folder, "dots"), os.O_WRONLY)
        sys.addaudithook(lambda event, _: event.startswith(("open", "os.")) and os.write(pipe, b"."))
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

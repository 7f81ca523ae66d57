"""Python programs in forks of one process that has imported torch and transformers, which takes seconds.

    with ForkedPython() as python:
        python.run("-m", "perta_fast", "inspect", "model", cwd=folder)

That process has computed nothing and imported nothing of perta_fast: a program imports that as a new process does. A
program ends as Python ends it, but that modules are not taken down, which takes longer than most programs here.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from tests.support.patience import HUNG

IMPORTED = (
    *("torch", "blake3", "safetensors.torch", "tqdm.auto", "torch.utils.flop_counter"),
    *("transformers.convert_slow_tokenizer", "transformers.tokenization_utils_tokenizers"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    "transformers.models.llama.modeling_llama",
)


class ForkedPython:
    """The process that is forked. more: modules that it imports too. It has one child at a time."""

    def __init__(self, *more: str) -> None:
        self._more = more

    def __enter__(self) -> "ForkedPython":
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked", *self._more],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # for torch, like the fixture one_thread
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

    def run(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run what ``python`` would with ``arguments``: ``-m MODULE``, ``-c CODE`` or a file first."""
        command = list(map(str, arguments))
        with tempfile.TemporaryDirectory() as folder:
            assert self._server.stdin is not None and self._server.stdout is not None
            order = [folder, str(cwd), command, dict(os.environ)]
            print(json.dumps(order), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
            assert answer, "the process that is forked has ended"
            output, errors = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, int(answer), output, errors)


def _serve() -> None:
    for name in (*IMPORTED, *sys.argv[1:]):
        import_module(name)
    assert not any(name.split(".")[0] == "perta_fast" for name in sys.modules)
    gc.collect()
    gc.freeze()  # so that children do not look through all this, which would copy it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _end(_work(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


def _end(status: int) -> NoReturn:
    """What Python does as it ends, without taking down the modules."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    gc.collect()  # for what still has to be closed
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(status)


def _work(folder: str, cwd: str, command: list[str], environment: dict[str, str]) -> int:
    """Run the program in the child; returns its exit status."""
    signal.alarm(HUNG)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o666), number)
    os.chdir(cwd)
    status = 0
    try:
        _run(*command)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    return status


def _run(first: str, *more: str) -> None:
    if first == "-m":
        sys.argv, sys.path[0] = list(more), ""
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *more[1:]], ""
        exec(more[0], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [first, *more], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve()

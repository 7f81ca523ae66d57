"""Processes that know each other through gloo, forked from one that has imported everything already."""

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.forked import IMPORTED
from tests.support.patience import HUNG

_EVERYTHING = [
    *("pytest", "torch.distributed", *IMPORTED, "perta_fast._C", "perta_fast.cli", "perta_fast.resuming"),
    *("perta_fast.runs.unlearn", "perta_fast.runs.unlearn_streamed", "perta_fast.runs.evaluate_streamed"),
    *("perta_fast.streaming.forecast.choice", "perta_fast.sweeping.streamed"),
    *("tests.support.checkpoints", "tests.support.models", "tests.families.matrix"),
]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_EVERYTHING)


class Ended(NamedTuple):
    """How one process of a command ended."""

    status: int
    output: str
    errors: str


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(group, *arguments)`` returned on each rank, or the error that it raised.

    A rank that was killed gives None.
    """
    return _start(world, _work_in_a_group, work, arguments)


def perta_on_ranks(world: int, *arguments: object, setup: Callable[[int], object] | None = None) -> list[Any]:
    """``perta`` as torchrun would start it, after ``setup(rank)``: an ``Ended`` a rank, None if killed."""
    return _start(world, _command, setup, [str(each) for each in arguments])


def _start(world: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as reserved:
        # While this socket is open no other process is given its port; the first rank may still listen there.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("localhost", 0))
        port = reserved.getsockname()[1]
        children = []
        for rank in range(world):
            ours, theirs = _forks.Pipe(duplex=False)
            given = (rank, world, port, Path(folder, str(rank)), theirs, target, arguments)
            child = _forks.Process(target=_child, args=given, daemon=True)
            child.start()
            theirs.close()
            children.append((child, ours))
        return [_outcome(child, ours) for child, ours in children]


def _outcome(child: Any, ours: Any) -> Any:
    try:
        assert ours.poll(HUNG), "a rank does not answer"
        return pickle.loads(ours.recv_bytes())
    except EOFError:
        return None
    finally:
        child.kill()


def _child(
    rank: int, world: int, port: int, folder: Path, answer: Any, target: Callable[..., Any], arguments: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        outcome = target(rank, folder, *arguments)
    except BaseException as error:
        outcome = error
    answer.send_bytes(pickle.dumps(outcome))  # whole, where torch would send handles of memory
    answer.close()
    os._exit(0)  # without saying good-bye, which would wait for a rank that has died


def _work_in_a_group(rank: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    # All are to have joined before any can leave; by files, since every other way to meet goes with a process.
    folder.with_suffix(".joined").touch()
    while len(list(folder.parent.glob("*.joined"))) < dist.get_world_size():
        time.sleep(0.01)
    return work(dist.group.WORLD, *arguments)


def _command(rank: int, folder: Path, setup: Callable[[int], object] | None, arguments: list[str]) -> Ended:
    from perta_fast.cli import main

    output, errors = folder.with_suffix(".out"), folder.with_suffix(".err")
    with open(output, "w") as sys.stdout, open(errors, "w") as sys.stderr:
        if setup is not None:
            setup(rank)
        try:
            status = main(arguments)
        except SystemExit as error:  # of argparse
            status = int(str(error.code))
    return Ended(status, output.read_text(), errors.read_text())

"""The injection of faults itself: each fault strikes the chosen call and no other.

The children are plain Python programs, all of whose calls are known.
"""

import errno
import os
import signal
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.crash.shim import CHANGES, KINDS, Faults, Point, Shim, points
from tests.support.children import run_child

# Every call that the library knows: its kind, and Python that makes it once and returns the number of bytes moved.
CALLS: dict[str, tuple[str, str]] = {
    "os.write": ("write", "os.write(a, b'0123456789')"),
    "os.pwrite": ("write", "os.pwrite(a, b'0123456789', 0)"),
    "os.writev": ("write", "os.writev(a, [b'0123', b'', b'456789'])"),
    "os.pwritev": ("write", "os.pwritev(a, [b'0123', b'456789'], 0)"),
    "file.write": ("write", "open('a', 'wb', buffering=0).write(b'0123456789')"),
    "os.read": ("read", "len(os.read(b, 10))"),
    "os.pread": ("read", "len(os.pread(b, 10, 0))"),
    "os.readv": ("read", "os.readv(b, [bytearray(4), bytearray(6)])"),
    "os.preadv": ("read", "os.preadv(b, [bytearray(4), bytearray(6)], 0)"),
    "file.readinto": ("read", "open('b', 'rb', buffering=0).readinto(bytearray(10))"),
    "os.copy_file_range": ("copy", "os.copy_file_range(b, a, 10)"),
    "os.sendfile": ("copy", "os.sendfile(a, b, 0, 10)"),
    "os.ftruncate": ("truncate", "os.ftruncate(a, 10)"),
    "os.truncate": ("truncate", "os.truncate('a', 10)"),
    "os.fsync": ("fsync", "os.fsync(a)"),
    "os.fdatasync": ("fsync", "os.fdatasync(a)"),
    "os.rename": ("rename", "os.rename('a', 'c')"),
    "os.replace": ("rename", "os.replace('a', 'b')"),
    "os.rename in a directory": ("rename", "os.rename('a', 'c', src_dir_fd=here, dst_dir_fd=here)"),
    "os.unlink": ("unlink", "os.unlink('a')"),
    "os.unlink in a directory": ("unlink", "os.unlink('a', dir_fd=here)"),
    "os.rmdir": ("unlink", "os.rmdir('a directory')"),
}
SIZED = [name for name, (kind, _) in CALLS.items() if kind in ("write", "read", "copy")]
START = """
import os, threading
here = os.open('.', os.O_RDONLY)
os.mkdir('a directory')
a = os.open('a', os.O_RDWR | os.O_CREAT)
b = os.open('b', os.O_RDWR | os.O_CREAT)
os.write(os.open('b', os.O_RDWR), b'abcdefghijklmnop')
"""
TEN_WRITES = (
    START
    + """
for k in range(10):
    try:
        os.write(a, b'%d%d' % (k, k))
    except OSError as error:
        print(k, error.errno)
"""
)
IN_THREADS = (
    START
    + """
failed = []
def work():
    for _ in range(200):
        try:
            os.write(a, b'.')
        except OSError as error:
            failed.append(error.errno)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""
)


def python(shim: Shim, folder: Path, program: str, faults: Faults) -> CompletedProcess[str]:
    """Run ``program`` in ``folder``/run under ``faults``."""
    directory = folder / "run"
    directory.mkdir(parents=True)
    command = [sys.executable, "-I", "-S", "-c", program]
    return run_child(command, cwd=directory, env=os.environ | faults.environment(shim.library))


def call_once(name: str) -> str:
    """A program that makes one call, prints its result or its error, and then "went on"."""
    return START + (
        f"try:\n    print({CALLS[name][1]})\nexcept OSError as error:\n    print(error.errno)\nprint('went on')\n"
    )


def only(name: str, folder: Path, **settings: object) -> Faults:
    """Faults of the one call in ``call_once``; START writes only to b."""
    kind = CALLS[name][0]
    return Faults(f"{folder}/run/{'b' if kind == 'read' else 'a'}", (kind,), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_counted_with_its_kind_and_path(name: str, shim: Shim, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = python(shim, tmp_path, call_once(name), only(name, tmp_path, log=log))
    assert done.stdout.endswith("went on\n"), done.stderr
    (point,) = points(log)
    moves_bytes = CALLS[name][0] in ("write", "read", "copy", "truncate")
    assert (point.kind, point.size) == (CALLS[name][0], 10 if moves_bytes else 0)
    assert {point.path, point.target} <= {"", *(f"{tmp_path}/run/{name}" for name in ("a", "b", "c", "a directory"))}


@pytest.mark.parametrize("name", CALLS)
def test_an_error_comes_instead_of_the_call(name: str, shim: Shim, tmp_path: Path) -> None:
    for number, then in enumerate(("ENOSPC", "EIO", "EROFS")):
        folder = tmp_path / str(number)
        done = python(shim, folder, call_once(name), only(name, folder, then=then))
        assert done.stdout == f"{getattr(errno, then)}\nwent on\n", done.stderr
        assert untouched(folder / "run")


@pytest.mark.parametrize("name", SIZED)
def test_a_short_call_takes_half_and_says_so(name: str, shim: Shim, tmp_path: Path) -> None:
    done = python(shim, tmp_path, call_once(name), only(name, tmp_path, then="short"))
    assert done.stdout == "5\nwent on\n", done.stderr
    written = CALLS[name][0] != "read"
    assert (tmp_path / "run" / "a").stat().st_size == (5 if written else 0)


@pytest.mark.parametrize("name", SIZED)
def test_a_torn_call_takes_half_and_kills(name: str, shim: Shim, tmp_path: Path) -> None:
    done = python(shim, tmp_path, call_once(name), only(name, tmp_path, then="torn"))
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    written = CALLS[name][0] != "read"
    assert (tmp_path / "run" / "a").stat().st_size == (5 if written else 0)


@pytest.mark.parametrize("name", ["os.fsync", "os.rename", "os.ftruncate"])
def test_a_call_without_halves_is_made(name: str, shim: Shim, tmp_path: Path) -> None:
    done = python(shim, tmp_path / "short", call_once(name), only(name, tmp_path / "short", then="short"))
    assert done.stdout == "None\nwent on\n", done.stderr
    done = python(shim, tmp_path / "torn", call_once(name), only(name, tmp_path / "torn", then="torn"))
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    for then in ("short", "torn"):
        assert untouched(tmp_path / then / "run") == (name == "os.fsync")


@pytest.mark.parametrize("name", CALLS)
def test_a_kill_comes_before_or_after_the_call(name: str, shim: Shim, tmp_path: Path) -> None:
    for then in ("kill before", "kill after"):
        folder = tmp_path / then
        done = python(shim, folder, call_once(name), only(name, folder, then=then))
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
        changes = CALLS[name][0] not in ("read", "fsync")
        assert untouched(folder / "run") == (then == "kill before" or not changes)


def untouched(directory: Path) -> bool:
    """Whether everything is as START has made it."""
    content = {path.name: path.read_bytes() if path.is_file() else b"" for path in directory.iterdir()}
    return content == {"a": b"", "b": b"abcdefghijklmnop", "a directory": b""}


@pytest.mark.parametrize("at", [0, 4, 9])
def test_only_the_chosen_ordinal_is_struck(at: int, shim: Shim, tmp_path: Path) -> None:
    done = python(shim, tmp_path, TEN_WRITES, Faults("/run/a", then="EIO", at=at))
    assert done.stdout == f"{at} {errno.EIO}\n"
    written = "".join(f"{k}{k}" for k in range(10) if k != at)
    assert (tmp_path / "run" / "a").read_text() == written


def test_a_lasting_fault_strikes_all_later_calls(shim: Shim, tmp_path: Path) -> None:
    python(shim, tmp_path, TEN_WRITES, Faults("/run/a", then="EIO", at=6, lasting=True))
    assert (tmp_path / "run" / "a").read_text() == "001122334455"


def test_a_loop_gets_through_a_disk_that_always_takes_half(shim: Shim, tmp_path: Path) -> None:
    program = START + "rest = b'0123456789'\nwhile rest: rest = rest[os.write(a, rest):]\n"
    log = tmp_path / "log"
    python(shim, tmp_path, program, Faults("/run/a", then="short", lasting=True, log=log))
    assert (tmp_path / "run" / "a").read_bytes() == b"0123456789"
    assert [point.size for point in points(log)] == [10, 5, 2, 1]


def test_a_kill_leaves_all_before_it_and_nothing_after(shim: Shim, tmp_path: Path) -> None:
    for then, written in (("kill before", "0011"), ("torn", "00112"), ("kill after", "001122")):
        folder = tmp_path / then
        done = python(shim, folder, TEN_WRITES, Faults("/run/a", then=then, at=2, kinds=("write",)))
        assert done.returncode == -signal.SIGKILL
        assert (folder / "run" / "a").read_text() == written


def test_other_paths_and_other_kinds_are_neither_counted_nor_struck(shim: Shim, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = TEN_WRITES + "os.fsync(a)\nprint('done')\n"
    for faults in (
        Faults("/run/c", KINDS, "kill before", lasting=True, log=log),
        Faults("/run/a", ("rename",), "kill before", lasting=True, log=log),
    ):
        done = python(shim, tmp_path / faults.kinds[0], program, faults)
        assert (done.returncode, done.stdout) == (0, "done\n")
    assert points(log) == []


def test_the_log_tells_the_calls_in_their_order(shim: Shim, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = START + (
        "os.pwrite(a, bytes(8192), 4096)\nos.fsync(a)\nos.ftruncate(a, 100)\nos.copy_file_range(b, a, 7)\n"
        "os.rename('a', 'a new name')\nos.fsync(here)\nos.unlink('b')\n"
    )
    python(shim, tmp_path, program, Faults(f"{tmp_path}/run", log=log))
    a, b, new = (f"{tmp_path}/run/{name}" for name in ("a", "b", "a new name"))
    assert points(log) == [
        Point("write", 16, b, ""),
        Point("write", 8192, a, ""),
        Point("fsync", 0, a, ""),
        Point("truncate", 100, a, ""),
        Point("copy", 7, b, a),
        Point("rename", 0, a, new),
        Point("fsync", 0, f"{tmp_path}/run", ""),
        Point("unlink", 0, b, ""),
    ]


def test_threads_share_one_count(shim: Shim, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert python(shim, tmp_path, IN_THREADS, Faults("/run/a", log=log)).returncode == 0
    assert points(log) == [Point("write", 1, f"{tmp_path}/run/a", "")] * 1600


@pytest.mark.parametrize("at", [0, 801, 1599])
def test_one_thread_is_struck_once(at: int, shim: Shim, tmp_path: Path) -> None:
    done = python(shim, tmp_path, IN_THREADS, Faults("/run/a", then="ENOSPC", at=at))
    assert done.stdout == f"[{errno.ENOSPC}]\n"
    assert (tmp_path / "run" / "a").read_bytes() == b"." * 1599


def test_children_of_the_child_are_left_alone(shim: Shim, tmp_path: Path) -> None:
    writes = "import os; os.write(os.open('a', os.O_RDWR), b'child')"
    program = START + (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {writes!r}], check=True)\n"
        "if os.fork() == 0:\n    os.pwrite(a, b'fork', 5)\n    os._exit(0)\n"
        "os.wait()\nos.pwrite(a, b'parent', 9)\n"
    )
    done = python(shim, tmp_path, program, Faults("/run/a", then="kill before"))
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "a").read_bytes() == b"childfork"


@pytest.mark.parametrize(
    "settings", [{"path": ""}, {"kinds": ()}, {"kinds": ("open",)}, {"at": -1}, {"then": "ENOSUCH"}]
)
def test_faults_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no call can match|is not a fault"):
        Faults(**{"path": "x", **settings})  # type: ignore[arg-type]


def test_perta_runs_under_faults(shim: Shim, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    log = tmp_path / "log"
    done = shim.perta("inspect", tmp_path / "model", faults=Faults(str(tmp_path), CHANGES, log=log))
    assert (done.returncode, points(log)) == (2, [])
    assert done.stderr.startswith(f"perta: error: {tmp_path / 'model'}")

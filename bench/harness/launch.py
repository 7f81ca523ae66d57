"""Run one command and write its time and memory as JSON: ``python launch.py REPORT COMMAND ...``.

This is a small program of its own because on Linux the peak memory of a new process begins at that of the process
that started it. If a process that has torch loaded started the command, every command would seem large.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

INTERVAL = 0.01  # seconds between two reads of /proc


def watch(pid: int, finished: threading.Event, peaks: dict[str, int]) -> None:
    """Keep the largest RssAnon and RssFile of ``pid`` in ``peaks``, in bytes, until ``finished`` is set.

    They can miss a peak that is shorter than the interval. ``peak_rss``, which the kernel counts, cannot.
    """
    while not finished.wait(INTERVAL):
        try:
            with open(f"/proc/{pid}/status") as status:
                for line in status:
                    name, _, value = line.partition(":")
                    if name in ("RssAnon", "RssFile"):
                        peaks[name] = max(peaks.get(name, 0), int(value.split()[0]) * 1024)
        except (OSError, ValueError):
            return


def main() -> int:
    """Run the command in ``sys.argv[2:]`` and return its exit status."""
    report, *command = sys.argv[1:]
    peaks: dict[str, int] = {}
    finished = threading.Event()
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    watcher = threading.Thread(target=watch, args=(pid, finished, peaks))
    watcher.start()
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    finished.set()
    watcher.join()
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * unit,
        "peak_anonymous": peaks.get("RssAnon"),
        "peak_file": peaks.get("RssFile"),
    }
    with open(report, "w") as file:
        json.dump(result, file)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())

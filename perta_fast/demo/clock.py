"""The time that each phase of a demo takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds by phase: wall time and processor time."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the context to phase ``name``."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = self.wall.get(name, 0) + time.perf_counter() - wall
        self.cpu[name] = self.cpu.get(name, 0) + time.process_time() - cpu

    def summary(self) -> str:
        """A line for each phase, and the sum."""
        rows = [(name, self.wall[name], self.cpu[name]) for name in self.wall]
        rows.append(("in all", sum(self.wall.values()), sum(self.cpu.values())))
        lines = [f"{name:36}{wall:8.1f}{cpu:8.1f}" for name, wall, cpu in rows]
        return "\n".join([f"{'seconds':36}{'wall':>8}{'cpu':>8}", *lines])

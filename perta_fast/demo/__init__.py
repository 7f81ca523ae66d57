"""``perta demo``: the whole job on small models made on the spot."""

from perta_fast.demo.run import run_demo

__all__ = ["run_demo"]

"""The threads of OpenMP, with which torch computes: they sleep while they wait.

By default they spin, for about 15 ms after each operation: cheap on a machine that is idle otherwise. Where other
processes want the processors too, a thread that spins keeps them from the thread that it waits for. Then a run takes
many times as long.
"""

import os
import sys

# Of OpenMP, and of the runtimes of GCC and Intel.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def sleep_while_waiting() -> None:
    """Set ``OMP_WAIT_POLICY``, unless the user has set how threads wait. The runtime reads it when torch is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"

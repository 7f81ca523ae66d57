"""The commands of ``perta``, one a module: ``add`` declares its options, ``run`` calls the package."""

from perta_fast.cli.main import main

__all__ = ["main"]

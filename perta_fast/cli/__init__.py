"""The command line, ``perta``: one module a command, with the table of its options and what it runs."""

from perta_fast.cli.importing import importing

with importing():
    from perta_fast.cli.main import main

__all__ = ["main"]

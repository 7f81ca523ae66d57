"""One page that shows what a run did: ``write_report``."""

from perta_fast.reporting.run import write_report

__all__ = ["write_report"]

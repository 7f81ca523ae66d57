"""One page that shows what a run did: ``write_page``."""

from perta_fast.reporting.writing import write_page

__all__ = ["write_page"]

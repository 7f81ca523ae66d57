"""One page that shows what a run did: ``write_page``."""

from perta_fast.reporting.run import write_page

__all__ = ["write_page"]

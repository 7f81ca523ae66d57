"""``python -m perta_fast`` is ``perta``."""

import sys

from perta_fast.cli import main

sys.exit(main())

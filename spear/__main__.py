"""``python -m spear`` is the ``spear`` command."""

import sys

from spear.cli import main

sys.exit(main())

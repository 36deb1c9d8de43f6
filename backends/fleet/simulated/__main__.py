"""``python -m fanfold.backends.fleet.simulated``; see `child.main`."""

from __future__ import annotations

import sys

from .child import main

if __name__ == "__main__":
    sys.exit(main())

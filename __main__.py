"""``python -m fanfold``."""

from __future__ import annotations

from .graphs.cli.app import main

if __name__ == "__main__":
    main()

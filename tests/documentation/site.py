"""Copy the pages for the site: ``docs/``, and the pages of the root that they link to."""

from __future__ import annotations

import re
import shutil
from typing import Final

from .reference import ROOT

TARGET: Final = ROOT / "build" / "docs"
PAGES_OF_THE_ROOT: Final = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def main() -> None:
    """Write ``build/docs``."""
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(ROOT / "docs", TARGET)
    for page in TARGET.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("](../", "]("), encoding="utf-8")
    for name in PAGES_OF_THE_ROOT:
        text = (ROOT / name).read_text(encoding="utf-8")
        (TARGET / name).write_text(re.sub(r"\]\(docs/", "](", text), encoding="utf-8")


if __name__ == "__main__":
    main()

"""``make pictures``: run each preset and take the picture of its report for the tutorials.

Needs Chromium, and the extras ``report`` and ``chem``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fanfold.configs.preset_files import preset_names
from fanfold.graphs.run.stage_folder import find_run
from fanfold.tests.integration.report.browser import find_browser

from .reference import ROOT

WIDTH, HEIGHT = 1100, 900


def main() -> None:
    """Write ``docs/pictures/PRESET.png`` for each preset, or for those in the arguments."""
    browser = find_browser()
    if browser is None:
        sys.exit("no Chromium is installed; install it to take pictures")
    with TemporaryDirectory() as folder:
        for name in sys.argv[1:] or preset_names():
            out = Path(folder) / name
            run = [sys.executable, "-m", "fanfold", "run", name, "--out", str(out), "--quiet"]
            subprocess.run(run, check=True, cwd=folder)
            page = Path(folder) / f"{name}.html"
            last = str(find_run(out, None))  # of a pipeline, the last stage
            report = [sys.executable, "-m", "fanfold", "report", last, "-o", str(page)]
            subprocess.run(report, check=True, cwd=folder)
            picture = ROOT / "docs" / "pictures" / f"{name}.png"
            picture.parent.mkdir(exist_ok=True)
            subprocess.run(
                [
                    browser,
                    "--headless",
                    "--no-sandbox",
                    "--hide-scrollbars",
                    "--virtual-time-budget=10000",
                    f"--user-data-dir={folder}/browser",
                    f"--window-size={WIDTH},{HEIGHT}",
                    f"--screenshot={picture}",
                    page.as_uri(),
                ],
                check=True,
                stderr=subprocess.DEVNULL,
            )
            print(f"{picture.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()

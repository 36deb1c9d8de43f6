"""``make test-install``: wheel and sdist install into empty environments, and fanfold runs there.

For each Python on PATH from 3.11 to 3.14, or those that ``--python`` names: wheel and sdist alone,
the wheel with each extra, and with all of them. An extra whose packages have no wheel for a Python
is named, not hidden; so is a Python that is missing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHONS: Final = ("python3.11", "python3.12", "python3.13", "python3.14")
OWN: Final = frozenset({"dev", "test", "docs"})
"""Extras for work on fanfold itself, which `make` installs."""
NO_WHEEL: Final = ("No matching distribution found", "Failed building wheel", "Failed to build")


def list_extras() -> list[str]:
    """Return the extras that users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [name for name in project["optional-dependencies"] if name not in OWN]


def make_environment(folder: Path, python: str) -> Path:
    """Create an empty environment; return its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def build(python: str, folder: Path) -> tuple[Path, Path]:
    """Build wheel and sdist; return their paths."""
    own = make_environment(folder / "build", python)
    pip = [str(own), "-m", "pip", "install", "--quiet", "build"]
    subprocess.run(pip, check=True)
    target = folder / "dist"
    command = [str(own), "-m", "build", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def try_install(python: str, folder: Path, what: str) -> str:
    """Install into an empty environment and run fanfold; return ``ok`` or what went wrong."""
    own = make_environment(folder, python)
    install = subprocess.run(
        [str(own), "-m", "pip", "install", "--quiet", what],
        capture_output=True,
        text=True,
        check=False,
    )
    if install.returncode:
        lines = [line for line in install.stderr.splitlines() if line.startswith("ERROR")]
        is_extra = "[" in what  # without one, fanfold must install
        no_wheel = is_extra and any(word in install.stderr for word in NO_WHEEL)
        return f"{'no wheel' if no_wheel else 'FAILED'}: {lines[-1] if lines else install.stderr}"
    steps = (
        [str(own), "-m", "pip", "check"],
        [str(own), "-m", "fanfold", "--version"],
        [str(own), "-m", "fanfold", "run", "data_annotation", "--quiet", "--out", "run"],
        [str(own), "-m", "fanfold", "results", "run", "-o", "rows.csv"],
    )
    for step in steps:
        done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"FAILED: {' '.join(step[1:])}: {(done.stdout + done.stderr)[-400:]}"
    return "ok"


def iter_targets(wheel: Path, sdist: Path, extras: list[str]) -> Iterator[tuple[str, str]]:
    """Yield a name and what pip installs."""
    yield "wheel", str(wheel)
    yield "sdist", str(sdist)
    for extra in extras:
        yield f"wheel[{extra}]", f"{wheel}[{extra}]"
    if len(extras) > 1:
        listed = ",".join(extras)
        yield "wheel, all extras", f"{wheel}[{listed}]"


def main() -> None:
    """Try all of them; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", choices=[*list_extras(), []], default=[])
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated")
    options = parser.parse_args()
    extras = options.extras or list_extras()
    wanted: list[str] = options.python or list(PYTHONS)
    pythons = [found for name in wanted if (found := shutil.which(name))]
    print("not found:", *([name for name in wanted if not shutil.which(name)] or ["none"]))
    failed = not pythons or (options.python is not None and len(pythons) < len(wanted))
    for python in pythons:
        with TemporaryDirectory(prefix="fanfold-install-") as name:
            folder = Path(name)
            for target, what in iter_targets(*build(python, folder), extras):
                found = try_install(python, folder / "env", what)
                shutil.rmtree(folder / "env")
                failed = failed or found.startswith("FAILED")
                print(f"{Path(python).name} {target}: {found}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

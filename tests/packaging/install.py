"""``make test-install``: wheel and sdist install into empty environments, and fanfold runs there.

For each Python on PATH from 3.11 to 3.14, or those that ``--python`` names: wheel and sdist alone,
the wheel with each extra, and with all of them. Each time a preset runs, and the modules of the
extra are imported; without extras, the message that names a missing one is read. An extra whose
packages have no wheel for a Python is named, not hidden; so is a Python that is missing.
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
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHONS: Final = ("python3.11", "python3.12", "python3.13", "python3.14")
OWN: Final = frozenset({"dev", "test", "docs"})
"""Extras for work on fanfold itself, which `make` installs."""
MODULES: Final = {
    "parsl": ("parsl",),
    "academy": ("academy.manager",),
    "endpoint": ("globus_compute_endpoint",),
    "postgres": ("langgraph.checkpoint.postgres.aio", "psycopg_pool"),
    "chem": ("rdkit.Chem",),
    "report": ("altair", "vl_convert"),
    "first": ("alcf_tokens.auth",),
    "agents": ("langchain.agents",),
    "metrics": ("prometheus_client",),
    "pandas": ("pandas",),
    "polars": ("polars",),
    "analysis": ("duckdb",),
    "pdf": ("pypdfium2",),
    "studio": ("langgraph_api", "langgraph_cli"),
}
"""What an extra installs and fanfold imports."""
NO_WHEEL: Final = ("No matching distribution found", "Failed building wheel", "Failed to build")


class Target(NamedTuple):
    """What is installed."""

    name: str
    what: str  # pip's argument
    extras: list[str]


def list_extras() -> list[str]:
    """Return the extras that users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [name for name in project["optional-dependencies"] if name not in OWN]


def read_version(python: str) -> str | None:
    """Return the version of an interpreter; None if it does not start, as pyenv's stand-ins."""
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def make_environment(folder: Path, python: str, *options: str) -> Path:
    """Create an empty environment; return its Python."""
    subprocess.run([python, "-m", "venv", *options, str(folder)], check=True)
    return folder / "bin" / "python"


def build(own: Path, folder: Path) -> tuple[Path, Path]:
    """Build wheel and sdist; return their paths."""
    pip = [str(own), "-m", "pip", "install", "--quiet", "build"]
    subprocess.run(pip, check=True)
    target = folder / "dist"
    command = [str(own), "-m", "build", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def run_steps(own: Path, pip: list[str], folder: Path, extras: list[str]) -> str:
    """Run fanfold in an environment; return ``ok`` or the step that failed, with its output."""
    fanfold = str(own.with_name("fanfold"))
    modules = [module for extra in extras for module in MODULES[extra]]
    steps = [
        [*pip, "--python", str(own), "check"],
        *([str(own), "-c", f"import {module}"] for module in modules),
        [str(own), "-c", "import fanfold; fanfold.build_graph, fanfold.ChatFleet"],
        [fanfold, "--help"],
        [fanfold, "run", "quickstart", "--limit", "20", "--quiet", "--out", "run"],
        [fanfold, "results", "run", "-o", "rows.csv"],
    ]
    for step in steps:
        done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"FAILED: {' '.join(step[1:])}: {(done.stdout + done.stderr)[-400:]}"
    if not extras:
        step = [fanfold, "run", "quickstart", "--limit", "1", "--checkpointer", "postgresql://h/d"]
        done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 2 or "pip install 'fanfold[postgres]'" not in done.stderr:
            return f"FAILED: message on a missing extra: {done.returncode} {done.stderr[-400:]}"
    return "ok"


def try_install(python: str, pip: list[str], folder: Path, target: Target, uv: str | None) -> str:
    """Install into an empty environment and run fanfold; return ``ok`` or what went wrong."""
    own = make_environment(folder, python, "--without-pip")
    with_uv = [uv, "pip", "install", "--python", str(own)] if uv else []
    install = subprocess.run(
        [*(with_uv or [*pip, "--python", str(own), "install"]), "--quiet", target.what],
        capture_output=True,
        text=True,
        check=False,
    )
    if install.returncode:
        lines = [line for line in install.stderr.splitlines() if line.startswith("ERROR")]
        no_wheel = target.extras and any(
            word in install.stderr for word in NO_WHEEL
        )  # fanfold must
        return f"{'no wheel' if no_wheel else 'FAILED'}: {lines[-1] if lines else install.stderr}"
    return run_steps(own, pip, folder, target.extras)


def iter_targets(wheel: Path, sdist: Path, extras: list[str]) -> Iterator[Target]:
    """Yield wheel and sdist alone, the wheel with each extra, and with all of them."""
    yield Target("wheel", str(wheel), [])
    yield Target("sdist", str(sdist), [])
    for extra in extras:
        yield Target(f"wheel[{extra}]", f"{wheel}[{extra}]", [extra])
    if len(extras) > 1:
        yield Target("wheel[all together]", f"{wheel}[{','.join(extras)}]", extras)


def main() -> None:
    """Try all of them; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", choices=[*list_extras(), []], default=[])
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated")
    parser.add_argument("--uv", help="install with this uv, which is faster than pip")
    options = parser.parse_args()
    extras = options.extras or list_extras()
    wanted: list[str] = options.python or list(PYTHONS)
    found = {name: path for name in wanted if (path := shutil.which(name))}
    pythons = {path: version for path in found.values() if (version := read_version(path))}
    missing = [name for name in wanted if found.get(name) not in pythons]
    print("not found:", *(missing or ["none"]))
    failed = not pythons or (options.python is not None and bool(missing))
    for python, version in pythons.items():
        with TemporaryDirectory(prefix="fanfold-install-") as name:
            folder = Path(name)
            own = make_environment(folder / "build", python)
            pip = [str(own), "-m", "pip"]
            for target in iter_targets(*build(own, folder), extras):
                answer = try_install(python, pip, folder / "env", target, options.uv)
                shutil.rmtree(folder / "env")
                failed = failed or answer.startswith("FAILED")
                print(f"{version}, {target.name}: {answer}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

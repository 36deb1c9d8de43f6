"""Start-up: CPU time and imported modules of commands and of a worker."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

_CONFIG: Final = """\
name: start
input: {path: items.csv, id: id}
task:
  prompt: "Judge: {text}"
  schema: {type: object, required: [score], properties: {score: {type: number}}}
endpoints: {simulated: {nodes: 1, time_scale: 50}}
reduce: [{op: stats, field: score}]
"""
_COMMANDS: Final = (
    "--help",
    "presets list",
    "ls",
    "status r",
    "cost r",
    "failures r",
    "cancel r",
    "results r",
    "resume r",
    "check run.yaml",
    "endpoints run.yaml",
)
_RUN: Final = "import sys; from fanfold.graphs.cli.app import app; app({!r}, standalone_mode=False)"
_COUNT: Final = "import atexit, sys; atexit.register(lambda: print(len(sys.modules)));"


def measure(repeats: int) -> None:
    """Print the CPU time of short commands, and how many modules each imports.

    The CPU time is the least of several starts; that of ``check`` and ``endpoints`` contains the
    simulated server that they start.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    print(f"start-up, least CPU time of {repeats} starts")
    print(f"{'command':<20} {'CPU s':>6} {'modules':>8}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "run.yaml").write_text(_CONFIG)
        (folder / "items.csv").write_text("id,text\n" + "".join(f"i{n},t{n}\n" for n in range(50)))
        _start(["-m", "fanfold", "run", "run.yaml", "--out", "r", "--quiet"], folder)
        for command in _COMMANDS:
            words = command.split()
            cpu = min(_start(["-m", "fanfold", *words], folder) for _ in range(repeats))
            _print(f"fanfold {command}", cpu, _count_modules(_RUN.format(words), folder))
        worker = "import fanfold.graphs.worker"
        cpu = min(_start(["-c", worker], folder) for _ in range(repeats))
        _print("a worker", cpu, _count_modules(worker, folder))


def _print(name: str, cpu: float, modules: int) -> None:
    print(f"{name:<20} {cpu:>6.2f} {modules:>8,}")


def _start(arguments: list[str], folder: Path) -> float:
    """Run Python in a folder; return the CPU seconds that it and its children took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *arguments]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _count_modules(code: str, folder: Path) -> int:
    command = [sys.executable, "-c", f"{_COUNT} {code}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1])

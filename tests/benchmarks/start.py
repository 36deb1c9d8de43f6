"""Start-up: CPU time and imported modules of commands and of a worker."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import orjson

_CONFIG: Final = """\
name: start
input: {path: items.csv, id: id}
task:
  prompt: "Judge: {text}"
  schema: {type: object, required: [score], properties: {score: {type: number}}}
endpoints: {endpoints}
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
    "check served.yaml",
    "endpoints served.yaml",
)
_RUN: Final = "import sys; from fanfold.graphs.cli.app import app; app({!r}, standalone_mode=False)"
_COUNT: Final = "import atexit, sys; atexit.register(lambda: print(len(sys.modules)));"


def measure(repeats: int) -> None:
    """Print the CPU time of short commands, and how many modules each imports.

    The CPU time is the least of several starts, without that of the simulated model server which
    ``check`` and ``endpoints`` ask.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    print(f"start-up, least CPU time of {repeats} starts")
    print(f"{'command':<30} {'CPU s':>6} {'modules':>8}")
    with tempfile.TemporaryDirectory() as place, _serve() as url:
        folder = Path(place)
        simulated = "{simulated: {nodes: 1, time_scale: 50}}"
        (folder / "run.yaml").write_text(_CONFIG.replace("{endpoints}", simulated))
        (folder / "served.yaml").write_text(_CONFIG.replace("{endpoints}", f"{{urls: ['{url}']}}"))
        (folder / "items.csv").write_text("id,text\n" + "".join(f"i{n},t{n}\n" for n in range(50)))
        _start(["-m", "fanfold", "run", "run.yaml", "--out", "r", "--quiet"], folder)
        for command in _COMMANDS:
            words = command.split()
            cpu = min(_start(["-m", "fanfold", *words], folder) for _ in range(repeats))
            _print(f"fanfold {command}", cpu, _count_modules(_RUN.format(words), folder))
        worker = "import fanfold.graphs.worker"
        cpu = min(_start(["-c", worker], folder) for _ in range(repeats))
        _print("a worker", cpu, _count_modules(worker, folder))


@contextmanager
def _serve() -> Iterator[str]:
    """Run a simulated model server; yield its URL."""
    command = [sys.executable, "-P", "-m", "fanfold.backends.simulated"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None, "it has a pipe"
        assert server.stdout is not None, "it has a pipe"
        server.stdin.write(b"{}\n")
        server.stdin.flush()
        yield orjson.loads(server.stdout.readline())["urls"][0]
        server.stdin.close()  # it ends with its input


def _print(name: str, cpu: float, modules: int) -> None:
    print(f"{name:<30} {cpu:>6.2f} {modules:>8,}")


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

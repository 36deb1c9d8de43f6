"""``make bench-peers``: what an item costs with fanfold, datatrove and async-batch-llm.

Each peer runs in an environment of its own below ``.bench/``, made from a file with the hashes of
all its packages, with the settings that its documentation gives for large runs. All ask the same
questions of the same simulated server; the sides alternate round by round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fanfold.backends.simulated.spec import SimulationSpec

from ..figures import OtherPrograms, Page, Table, describe_machine, write_figures
from ..suite import DOCS, STREAMS, Place, open_place

FOLDER: Final = Path(__file__).parent
ENVIRONMENTS: Final = FOLDER.parents[2] / ".bench"
PEERS: Final = {"datatrove": "datatrove", "async-batch-llm": "async_batch_llm"}
"""Name of each package, and the beginning of the names of its files here."""


def make_environment(name: str) -> Path:
    """Make the environment of a peer, unless it is there, and return its Python."""
    folder, lock = ENVIRONMENTS / name, FOLDER / f"{name}.lock"
    made, python = folder / "made.lock", folder / "bin" / "python"
    if not made.exists() or made.read_bytes() != lock.read_bytes():
        print(f"installing {lock.name} into {folder}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(lock)]
        subprocess.run(pip, check=True)
        made.write_bytes(lock.read_bytes())
    return python


def read_version(name: str) -> str:
    """Return the version of a peer in its lock file."""
    lines = (FOLDER / f"{PEERS[name]}.lock").read_text().splitlines()
    return next(line.split("==")[1].split()[0] for line in lines if line.startswith(f"{name}=="))


def measure(items: int, rounds: int) -> list[Table]:
    """Measure all sides in turn.

    Args:
        items: Items in each run; a run of one item is taken off.
        rounds: How often each side runs.

    Returns:
        The CPU time per item, the wall time, and the peak memory.
    """
    note = f"{items:,} items, {STREAMS} in flight, one server, structured answers"
    cost = Table(
        "cost", "What does an item cost?", "CPU ms per item", f"{note}; net of a run of one item."
    )
    wall = Table("wall", "How long does it take?", "s", f"{note}; with the start of the program.")
    memory = Table("memory", "How much memory does it take?", "MB at most", f"{note}.")
    pythons = {name: make_environment(files) for name, files in PEERS.items()}
    with open_place(SimulationSpec.fast(nodes=1, max_num_seqs=STREAMS), items) as place:
        for number in range(rounds):
            for side, command in _list_sides(place, pythons).items():
                one = place.run(command(1, number))
                found = place.run(command(items, number))
                assert side == "raw aiohttp" or found.said["done"] == items, (side, found.said)
                cost.add(side, 1000 * (found.cpu_s - one.cpu_s) / (items - 1))
                wall.add(side, found.wall_s)
                memory.add(side, found.peak_mb)
                print(f"round {number + 1} of {rounds}: {side}: {found.wall_s:.1f} s", flush=True)
    return [cost, wall, memory]


def _list_sides(
    place: Place, pythons: dict[str, Path]
) -> dict[str, Callable[[int, int], list[str]]]:
    def ask(python: str, program: Path) -> Callable[[int, int], list[str]]:
        return lambda items, _: [python, str(program), place.urls[0], str(items), str(STREAMS)]

    sides: dict[str, Callable[[int, int], list[str]]] = {
        "raw aiohttp": ask(sys.executable, FOLDER.parent / "floor.py"),
        "fanfold": lambda items, number: place.fanfold(f"run-{items}-{number}", items),
    }
    return sides | {
        name: ask(str(python), FOLDER / f"{PEERS[name]}_run.py") for name, python in pythons.items()
    }


def main() -> None:
    """Measure, and write ``docs/benchmarks/peers/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DOCS / "peers", help="folder for the figures")
    given = parser.parse_args()
    others = OtherPrograms()
    tables = measure(given.items, given.rounds)
    machine = describe_machine(others)
    machine["packages"] |= {name: read_version(name) for name in PEERS}
    write_figures(given.out, Page(tables, machine, "make bench-peers"))
    print(f"{given.out}/README.md written")


if __name__ == "__main__":
    main()

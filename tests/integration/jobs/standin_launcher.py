"""A stand-in for mpiexec: runs a command N times, each on an address of this machine.

Usage: ``python standin_launcher.py NODES COMMAND …``
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main(nodes: int, command: list[str]) -> None:
    started = [
        subprocess.Popen(command, env=os.environ | {"FANFOLD_HOST": f"127.0.0.{2 + node}"})
        for node in range(nodes)
    ]

    def passed_on(number: int, _: object) -> None:
        for one in started:
            one.send_signal(number)

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, passed_on)
    for one in started:
        one.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

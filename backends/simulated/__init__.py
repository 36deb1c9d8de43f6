"""Simulated fleet: vLLM's HTTP interface on loopback, with latency, faults and marked answers.

`SimulatedFleet` runs in the current event loop, for tests; `launch` runs one in a child process
that ends with its parent. Every answer carries the system fingerprint ``fanfold-simulated``.
"""

from __future__ import annotations

from .faults import FaultRule
from .fleet import SimulatedFleet
from .process import LaunchedFleet, launch
from .spec import SimulationSpec

__all__ = [
    "FaultRule",
    "LaunchedFleet",
    "SimulatedFleet",
    "SimulationSpec",
    "launch",
]

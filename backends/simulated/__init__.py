"""Simulated fleet: vLLM's HTTP interface on loopback, with latency, faults and marked answers.

`fleet.SimulatedFleet` runs in the current event loop, for tests; `process.launch` runs one in a
child process that ends with its parent. Every answer carries the system fingerprint
``fanfold-simulated``.
"""

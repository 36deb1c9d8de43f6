"""Batch jobs: scripts, job chains, usage, and the environment that they bring along.

``schedulers.py`` lists the batch schedulers.
"""

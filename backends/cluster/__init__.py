"""Batch jobs: scripts, job chains, usage, and the environment that they bring along."""

"""Shards on endpoints of Globus Compute."""

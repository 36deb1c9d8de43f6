"""Run shards on endpoints of Globus Compute."""

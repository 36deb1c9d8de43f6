"""Places where shards run."""

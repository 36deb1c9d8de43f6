"""The parts that do the work: inputs, fleet, accounts, and where shards run."""

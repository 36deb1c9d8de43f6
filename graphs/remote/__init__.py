"""Run shards on workers: the coordinator, its tasks, and the heartbeat between both sides."""

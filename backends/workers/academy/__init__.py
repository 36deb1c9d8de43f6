"""Academy: long-lived agents that work on shards, wherever an executor starts them."""

"""Academy: long-running agents that run shards where an executor starts them."""

"""Backends that run shards on workers; ``registry.py`` lists them."""

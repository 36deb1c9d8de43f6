"""Backends that run shards on workers."""

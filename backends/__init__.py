"""Inputs, fleet, budgets, storage, model servers, and workers that run shards."""

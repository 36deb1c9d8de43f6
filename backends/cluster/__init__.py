"""Batch jobs: their scripts, the chain they form, what they used, and what they bring along."""

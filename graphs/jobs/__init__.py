"""Chains of batch jobs: submit, begin, end, cancel, and what they used."""

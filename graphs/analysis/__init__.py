"""Finished and unfinished runs as data: tables of results."""

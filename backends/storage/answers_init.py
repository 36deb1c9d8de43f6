"""Answers kept for equal requests, in a folder that any number of processes use at a time.

Each process appends to a file of its own and reads the others' files, so nothing is ever locked,
renamed or written over: shared file systems need no more than that.
"""

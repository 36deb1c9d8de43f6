"""Inputs: read and check the user's files, and write the items to a store.

``formats.py`` lists the input formats.
"""

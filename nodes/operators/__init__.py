"""Operators: what reduces items by asking the model."""

"""The steps of the map-reduce: plain async functions over ``Runtime[Context]``."""

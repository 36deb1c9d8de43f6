"""The model servers of a node: start, monitor, restart, list and stop them."""

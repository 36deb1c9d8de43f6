"""The fleet: many endpoints behind one chat model."""

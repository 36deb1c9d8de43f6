"""The parts of a session of a run, from its folder to its end."""

"""Requests to the model by files that a batch service answers: a transport beside the fleet."""

"""Runs as an agent's tool, as a service and as an Academy agent."""

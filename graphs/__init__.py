"""The graphs and their entry points: library, command line, langgraph CLI."""

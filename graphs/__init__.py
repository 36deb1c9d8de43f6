"""The graphs, and the doors to them: library, command line, langgraph CLI."""

"""The model servers of a node: started once, watched, restarted, listed, ended."""

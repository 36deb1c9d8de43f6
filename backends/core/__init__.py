"""Values, errors and protocols that all folders use; imports no other folder."""

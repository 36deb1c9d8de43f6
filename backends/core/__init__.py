"""What every room may rely on: values, errors and protocols. It imports no other room."""

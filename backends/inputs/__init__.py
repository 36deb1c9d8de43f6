"""From the user's files to a store of items: read, check everything, keep on disk."""

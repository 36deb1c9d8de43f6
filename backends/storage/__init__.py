"""What a run keeps: its folder, the journal of finished items, and the results made of it."""

"""What a session of a run consists of, from its folder to its end."""

"""What describes a run: the YAML file's models, its loader, and the presets."""

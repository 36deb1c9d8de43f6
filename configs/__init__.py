"""Configuration of a run: settings models, loader, presets, sites and sample data."""

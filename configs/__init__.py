"""Presets, model defaults and training recipes: YAML only, found through `importlib.resources`."""

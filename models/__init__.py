"""Detectors: YAML to ModelSpec to modules, heads, losses, cost."""

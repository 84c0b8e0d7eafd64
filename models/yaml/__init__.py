"""Model YAML to ModelSpec. Nothing here imports torch."""

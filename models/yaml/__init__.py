"""Model YAML to ModelSpec.  Torch is used for shapes only: a row's width is asked of its block."""

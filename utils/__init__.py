"""What every room needs: boxes, letterbox, errors, configuration."""

"""Training: from the settings of train.py to a finished run."""

"""Training, evaluation and prediction: the loops that join models and data."""

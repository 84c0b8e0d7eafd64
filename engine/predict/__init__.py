"""Prediction: objects in images, videos and streams."""

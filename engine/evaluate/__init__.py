"""Evaluation: metrics, curves and drawn detections of a detector on a data set."""

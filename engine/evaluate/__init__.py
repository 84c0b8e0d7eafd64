"""Evaluation: mAP, curves and pictures of a detector on a data set."""

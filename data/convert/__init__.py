"""Annotations of other tools to COCO JSON."""

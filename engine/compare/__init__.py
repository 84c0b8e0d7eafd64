"""Comparison: several models trained and measured under the same conditions."""

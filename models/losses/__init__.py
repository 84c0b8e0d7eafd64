"""Losses, one for each head."""

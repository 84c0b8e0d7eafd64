"""Detection heads: raw maps to boxes and scores."""

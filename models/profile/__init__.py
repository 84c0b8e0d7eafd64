"""Computed cost of a model: parameters, MACs, memory traffic; models of equal budget."""

"""Cost of a model on paper: parameters, MACs, memory traffic; models of equal budget."""

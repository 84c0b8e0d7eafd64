"""The results of a comparison as tables, plots and one HTML file."""

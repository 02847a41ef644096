"""What is read of a finished experiment: tables, plots, graphs, comparison."""

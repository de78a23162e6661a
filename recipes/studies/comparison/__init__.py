"""What recipes/compare.py is made of: the grid, its cells, verdicts and the report."""

"""Experiments: grids of runs, their verdicts and reports."""

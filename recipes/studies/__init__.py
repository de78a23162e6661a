"""Experiments: comparisons of mechanisms, and those of the DyDiLA paper."""

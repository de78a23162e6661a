"""The DyDiLA paper: its ablation steps and tables, its claims tested here, its figures."""

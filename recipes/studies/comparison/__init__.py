"""What recipes/compare.py is made of: the plan, its runs, their verdicts and the report."""

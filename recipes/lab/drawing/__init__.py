"""Colors, grids and the pictures that recipes/figures.py draws from."""

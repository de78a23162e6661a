"""How good generated images are: features, metrics, and a classifier of the procedural set."""

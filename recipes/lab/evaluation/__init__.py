"""How good generated images are: features, metrics, and a judge of the procedural set."""

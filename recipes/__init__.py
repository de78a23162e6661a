"""Scripts that train, sample, evaluate and compare, and the modules they share."""

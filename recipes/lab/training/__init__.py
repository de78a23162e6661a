"""What recipes/train.py is made of: settings, the loop, checkpoints, many devices."""

"""Parameter-free mathematics: one folder per operator; ``dispatch`` picks its implementation."""

"""Parameter-free mathematics: each fast function stands above its naive twin."""

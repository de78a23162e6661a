"""What decides which attention is better: controls, quality against resolution, and the page."""

"""What a user runs, timed whole: models, layers, launches, recipes and scans."""

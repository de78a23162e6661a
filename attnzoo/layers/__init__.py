"""Small parts with parameters that several mechanisms share."""

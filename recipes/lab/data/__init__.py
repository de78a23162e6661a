"""Labelled images: data sets, pictures in folders, a procedural set, latents."""

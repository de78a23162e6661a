"""What the scripts in recipes/ share: data, diffusion, training, evaluation, drawing, files."""

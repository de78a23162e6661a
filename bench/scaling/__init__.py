"""Training on several GPUs, timed, and checked to give what one process gives."""

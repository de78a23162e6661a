"""What is measured: cost, speed and memory of every mechanism, and the paper's own figures."""

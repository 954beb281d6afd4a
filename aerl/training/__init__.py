"""Training: one loop, its objectives, and checkpoints."""

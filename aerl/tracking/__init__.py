"""What a run leaves: its folder, its results, Weights & Biases."""

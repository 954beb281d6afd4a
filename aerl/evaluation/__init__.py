"""Evaluation: predict, attack, and count, one outcome for each sample."""

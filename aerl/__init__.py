"""aerl: train image classifiers by policy gradient or cross-entropy, and evaluate how robust they are."""

__version__ = "0.1.0"

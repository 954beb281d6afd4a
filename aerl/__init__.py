"""aerl: train image classifiers by policy gradient or cross-entropy, and judge how robust they really are."""

__version__ = "0.1.0"

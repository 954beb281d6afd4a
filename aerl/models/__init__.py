"""Classifiers: any network of `net(normalised images) -> logits`, behind its own normalisation."""

from aerl.models.classifier import Classifier, Normalize, adapt
from aerl.models.networks import CNN, AliCNN, torchvision_net

__all__ = ["CNN", "AliCNN", "Classifier", "Normalize", "adapt", "torchvision_net"]

"""Classifiers: any network of `net(normalised images) -> logits`, behind its own normalisation."""

from aerl.models.classifier import Classifier, Normalize, adapt
from aerl.models.networks import CNN, AliCNN, torchvision_net
from aerl.models.residual import PreActResNet, WideResNet, resnet18_cifar, vit

__all__ = [
    "CNN", "AliCNN", "Classifier", "Normalize", "PreActResNet", "WideResNet", "adapt", "resnet18_cifar",
    "torchvision_net", "vit",
]  # fmt: skip

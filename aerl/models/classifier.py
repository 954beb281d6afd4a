"""What training and attacks see: images in [0, 1] in, logits out, the normalisation inside."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel. Buffers, so that the state_dict carries the normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """(B, C, H, W) float32 in [0, 1] -> logits (B, K) float32, or float64 throughout.

    Normalisation is layer 0: an attack perturbs the dataset's own pixels, and no caller can forget it.
    Logits are returned in float32 at least, whatever autocast did inside: the softmax of bfloat16 logits is too
    coarse for input gradients, whose signs then often differ from those in float32.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalize(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

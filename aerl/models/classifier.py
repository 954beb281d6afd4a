"""What training and attacks see: images in [0, 1] in, logits out, the normalisation inside."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aerl.errors import UserError


class Normalize(nn.Module):
    """(x - mean) / std per channel, float32. Buffers, so that the state_dict has the normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for key, values in (("mean", mean), ("std", std)):
            if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
                raise UserError(f"model.{key}={list(values)}: must be finite{', and above 0' * (key == 'std')}")
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """(B, C, H, W) float32 in [0, 1] -> logits (B, K) float32, or float64 throughout.

    Normalisation is layer 0: an attack perturbs the dataset's own pixels. Logits are at least float32, because input
    gradients of the softmax of bfloat16 logits often have other signs. With `contiguous` the network gets contiguous
    images. Raises UserError unless the network returns real logits (B, K).
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        self.contiguous = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        if self.contiguous:  # .contiguous() would keep the ambiguous strides of a single channel
            x = x.flatten(1).view(x.shape)
        logits = self.net(x)
        if not isinstance(logits, Tensor):
            raise UserError(
                f"model.net: returned a {type(logits).__name__}, expected logits (images, classes); for torchvision "
                "networks with auxiliary outputs set +model.net.aux_logits=false"
            )
        if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.is_complex():
            raise UserError(
                f"model.net: returned {logits.dtype} of shape {tuple(logits.shape)} for {len(x)} images, expected "
                "logits (images, classes)"
            )
        return logits.to(device=x.device, dtype=torch.promote_types(logits.dtype, torch.float32))

"""What training and attacks see: images in [0, 1] in, logits out, the normalisation inside."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aerl.types import UserError


class Normalize(nn.Module):
    """(x - mean) / std per channel, float32. Buffers, so that the state_dict carries the normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for key, values, right in (("mean", mean, "finite"), ("std", std, "finite and above 0")):
            if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
                raise UserError(f"model.{key}={list(values)}: must be {right}")
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """(B, C, H, W) float32 in [0, 1] -> logits (B, K) float32, or float64 throughout.

    Normalisation is layer 0: an attack perturbs the dataset's own pixels, and no caller can forget it.
    Logits are returned in float32 at least, whatever autocast did inside: the softmax of bfloat16 logits is too
    coarse for input gradients, whose signs then often differ from those in float32.
    With `contiguous` the network gets its images in that layout, whatever they come in.
    Raises UserError if the network returns anything but a tensor (B, K) of real numbers.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        self.contiguous = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        if self.contiguous:  # .contiguous() leaves strides as they are that a single channel makes ambiguous
            x = x.flatten(1).view(x.shape)
        logits = self.net(x)
        if not isinstance(logits, Tensor):
            raise UserError(
                f"model.net: returned a {type(logits).__name__}: expected a tensor of logits (images, classes); "
                "+model.net.aux_logits=false leaves out the second outputs that torchvision's networks train with"
            )
        if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.is_complex():
            raise UserError(
                f"model.net: returned {logits.dtype} of shape {tuple(logits.shape)} for {len(x)} images: "
                "expected logits of shape (images, classes); squeeze() drops the dimension of a single image"
            )
        return logits.to(device=x.device, dtype=torch.promote_types(logits.dtype, torch.float32))

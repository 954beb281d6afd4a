"""What training and attacks see: images in [0, 1] in, logits out, the normalisation inside."""

import math
from collections.abc import Callable, Sequence
from typing import Any

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

    def withhold_normalization(self) -> None:
        """Let the network see images in [0, 1] from now on, whatever it was trained on."""
        self.normalize.mean.zero_()
        self.normalize.std.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        if self.contiguous:  # .contiguous() would keep the ambiguous strides of a single channel
            x = x.flatten(1).view(x.shape)
        remedy = "for torchvision networks with auxiliary outputs set model.net.aux_logits=false"
        return as_logits(self.net(x), x, "model.net", remedy)


class Adapted(nn.Module):
    """Any model as aerl sees one, see `adapt`."""

    def __init__(self, net: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.net, self.call, self.training = net, forward, net.training

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x) if self.call is None else self.call(self.net, x)
        remedy = "pick them: aerl.adapt(model, lambda model, x: model(x)[...])"
        return as_logits(output, x, "model", remedy)


def adapt(model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A model that takes images (B, C, H, W) in [0, 1] and returns logits (B, K), from any model.

    `forward(model, x)` passes what else the model needs, and picks the logits from what it returns:
    `aerl.adapt(model, lambda model, x: model(x, mode="test")["logits"])`.
    """
    return Adapted(model, forward)


def as_logits(output: Any, x: Tensor, what: str, remedy: str) -> Tensor:
    """The output (B, K) of a model for images x (B, ...) in at least float32; UserError for any other output."""
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise UserError(f"{what}: returned a {kind}, expected logits (images, classes); {remedy}")
    if output.ndim != 2 or output.shape[0] != x.shape[0] or output.is_complex():
        raise UserError(
            f"{what}: returned {output.dtype} of shape {tuple(output.shape)} for {len(x)} images, expected logits "
            "(images, classes)"
        )
    return output.to(device=x.device, dtype=torch.promote_types(output.dtype, torch.float32))

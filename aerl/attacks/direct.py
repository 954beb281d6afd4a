"""An attack that a user calls directly: `aerl.attacks.pgd(model, x, y, eps=0.5)`, without a generator of aerl's."""

from itertools import chain

import torch
from torch import Tensor, nn

from aerl.attacks.modes import attacking, predictions
from aerl.attacks.random import BatchGenerator, Noise, SampleGenerator, Seed
from aerl.errors import UserError


def noise_of(model: nn.Module, x: Tensor, y: Tensor, generator: Seed) -> Noise:
    """The random numbers for images x (B, C, H, W) of classes y (B,); one of aerl's own generators is returned as is.

    An int seeds one stream for each image, so that the batch size changes nothing; None is 0. A torch.Generator is
    drawn from for the batch. Raises UserError for images or labels that no attack can use, see `check_batch`.
    """
    if isinstance(generator, Noise):
        return generator
    check_batch(model, x, y)
    if isinstance(generator, torch.Generator):
        return BatchGenerator(generator, len(x))
    return SampleGenerator.for_images(x, seed=generator or 0)


def check_batch(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """UserError unless `model` gives finite logits for images x (B, C, H, W) in [0, 1] of classes y int64 (B,)."""
    check_images(x, y)
    if (device := device_of(model)) not in (None, x.device):
        raise UserError(f"images are on {x.device}, the model is on {device}; move one of them")
    if y.device != x.device:
        raise UserError(f"labels are on {y.device}, images on {x.device}; move one of them")
    if len(x):
        check_labels(model, x[:1], y)


def device_of(model: nn.Module) -> torch.device | None:
    """Where the first parameter or buffer of a model is; None without any."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def check_images(x: Tensor, y: Tensor) -> None:
    """UserError unless x are float images (N, C, H, W) in [0, 1], and y as many integer labels."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        form = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"images: {form}; expected a tensor (N, C, H, W)")
    if not x.is_floating_point():
        raise UserError(f"images: {x.dtype}; expected floats in [0, 1]: images.float() / 255")
    if not isinstance(y, Tensor) or y.ndim != 1 or len(y) != len(x):
        form = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"labels: {form}; expected one for each of {len(x)} images, ({len(x)},)")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"labels: {y.dtype}; expected the numbers of classes: labels.long()")
    if len(x) == 0:
        return
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):  # also NaN
        raise UserError(f"images: from {low:.3g} to {high:.3g}; expected [0, 1], with the normalisation in the model")


def check_labels(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The number of classes; UserError unless logits of images x (B, C, H, W) are finite, and labels y (N,) classes."""
    with attacking(model), torch.no_grad():
        logits = model(x)
    if (predictions(logits) < 0).any():
        raise UserError("model: its logits are NaN or infinite; check its weights, and that it takes images in [0, 1]")
    classes = int(logits.shape[1])
    low, high = y.aminmax()
    if low < 0 or high >= classes:
        raise UserError(f"labels: from {low} to {high}; the model has {classes} classes: expected 0 to {classes - 1}")
    return classes

"""Changes of a whole batch of training images at once, on whatever device it is.

What torchvision's v2 transforms do for a batch image by image is theirs; its flips, crops and erasures draw once for
the whole batch, so those are here.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aerl.types import Index, NonNegative, Probability

_GROUPS = 8  # of a batch, each with operations of its own by RandAugment


def augment(
    images: Tensor,
    generator: torch.Generator | None,
    *,
    hflip: Probability = 0.0,
    vflip: Probability = 0.0,
    translate: Probability = 0.0,
    crop: Index = 0,
    cutout: Index = 0,
    randaugment: Index = 0,
    magnitude: Index = 9,
) -> Tensor:
    """Change each image of uint8 (B, C, H, W) by its own draw; what moves in from outside is black.

    hflip, vflip: probabilities.
    translate: a fraction of the side: an image moves by round(U(-translate * side, translate * side)) whole pixels each
        way, which with the flips before it is torchvision's RandomHorizontalFlip, RandomVerticalFlip,
        RandomAffine(0, (translate, translate)).
    crop: pixels of padding, from which an image of the same size is cut: torchvision's RandomCrop(size, padding=crop).
    cutout: side in pixels of a black square around a random pixel, cut off at the border (DeVries & Taylor 2017).
    randaugment: number of operations, of `magnitude` out of 30, by torchvision's RandAugment (Cubuk et al. 2020); the
        same for each eighth of a batch. They are drawn from torch's global generator, all else from `generator`, which
        lives on the device of the images.

    With all of them at 0 the images come back untouched.
    """
    if randaugment:
        from torchvision.transforms.v2 import RandAugment

        change = RandAugment(randaugment, magnitude)
        images = torch.cat([change(part) for part in images.chunk(_GROUPS)])
    if not (hflip == vflip == translate == crop == 0):
        images = _moved(images, generator, hflip, vflip, translate, crop)
    return _cut_out(images, generator, cutout) if cutout else images


def mix(x: Tensor, y: Tensor, classes: int, *, cutmix: NonNegative = 0.0, mixup: NonNegative = 0.0) -> Any:
    """Images (B, C, H, W) in [0, 1] and labels (B,), mixed with those of another image of the batch, and their labels'
    shares (B, classes).

    By torchvision's CutMix (Yun et al. 2019) or MixUp (Zhang et al. 2018), with a share from Beta(alpha, alpha) for the
    batch; with an alpha for both, by either at random. Draws from torch's global generator of the CPU.
    """
    mixers = _mixers(classes, cutmix, mixup)
    return mixers[int(torch.randint(len(mixers), ()))](x, y)


@functools.cache
def _mixers(classes: int, cutmix: float, mixup: float) -> list[Callable[..., Any]]:
    from torchvision.transforms import v2

    kinds = ((v2.CutMix, cutmix), (v2.MixUp, mixup))
    return [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]


def _moved(
    images: Tensor, generator: torch.Generator | None, hflip: float, vflip: float, translate: float, crop: int
) -> Tensor:
    batch, channels, height, width = images.shape
    draw = torch.rand(4, batch, 1, generator=generator, device=images.device)
    down = torch.round((2 * draw[1] - 1) * (translate * height)).long()
    right = torch.round((2 * draw[3] - 1) * (translate * width)).long()
    if crop:
        offset = torch.randint(2 * crop + 1, (2, batch, 1), generator=generator, device=images.device)
        down, right = down + crop - offset[0], right + crop - offset[1]
    rows, row_inside = _origin(height, draw[0] < vflip, down)
    columns, column_inside = _origin(width, draw[2] < hflip, right)
    # One gather does it all: which pixel of the image each pixel of the result is, the same for each channel.
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
    moved = images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)
    return moved.mul_((row_inside[:, :, None] & column_inside[:, None, :])[:, None])


def _origin(side: int, flipped: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Where along one side each pixel comes from, (B, side), and whether that is inside the image.

    `flipped` is bool (B, 1), `shift` int64 (B, 1).
    """
    origin = torch.arange(side, device=shift.device) - shift
    inside = (origin >= 0) & (origin < side)
    return torch.where(flipped, side - 1 - origin, origin).clamp_(0, side - 1), inside


def _cut_out(images: Tensor, generator: torch.Generator | None, side: int) -> Tensor:
    batch, _, height, width = images.shape
    kept = []
    for length in (height, width):
        centre = torch.randint(length, (batch, 1), generator=generator, device=images.device)
        first = centre - side // 2
        place = torch.arange(length, device=images.device)
        kept.append((place < first) | (place >= first + side))
    return images * (kept[0][:, :, None] | kept[1][:, None, :])[:, None]

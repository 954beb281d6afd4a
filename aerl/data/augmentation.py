"""Random flips and shifts of a whole batch at once, on whatever device it is."""

import torch
from torch import Tensor

from aerl.types import Probability


def augment(
    images: Tensor,
    generator: torch.Generator | None,
    *,
    hflip: Probability,
    vflip: Probability,
    translate: Probability,
) -> Tensor:
    """Flip and shift each image of uint8 (B, C, H, W) by its own draw; what moves in from outside is black.

    `hflip` and `vflip` are probabilities. `translate` is a fraction of the side: an image moves by
    round(U(-translate * side, translate * side)) whole pixels each way, which with the flips before it is
    torchvision's RandomHorizontalFlip, RandomVerticalFlip, RandomAffine(0, (translate, translate)).
    `generator` lives on the device of the images. With all three at 0 the images come back untouched.
    """
    if hflip == vflip == translate == 0:
        return images
    batch, channels, height, width = images.shape
    draw = torch.rand(4, batch, 1, generator=generator, device=images.device)
    rows, row_inside = _origin(height, draw[0] < vflip, draw[1], translate)
    columns, column_inside = _origin(width, draw[2] < hflip, draw[3], translate)
    # One gather does it all: which pixel of the image each pixel of the result is, the same for each channel.
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
    moved = images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)
    return moved.mul_((row_inside[:, :, None] & column_inside[:, None, :])[:, None])


def _origin(side: int, flipped: Tensor, draw: Tensor, translate: float) -> tuple[Tensor, Tensor]:
    """Where along one side each pixel comes from, (B, side), and whether that is inside the image.

    `flipped` is bool (B, 1) and `draw` uniform in [0, 1), (B, 1).
    """
    shift = torch.round((2 * draw - 1) * (translate * side)).long()
    origin = torch.arange(side, device=draw.device) - shift
    inside = (origin >= 0) & (origin < side)
    return torch.where(flipped, side - 1 - origin, origin).clamp_(0, side - 1), inside

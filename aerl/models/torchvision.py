"""torchvision's ImageNet architectures for any number of classes, channels and any input size."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from aerl.types import Count, UserError

Architecture = Literal["resnet18", "resnet50", "densenet121"]


class Resize(nn.Module):
    """Bilinear, antialiased resize to size x size: inside the model, so that an attack keeps to the
    dataset's own pixels. Does nothing to images that have this size already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)


def torchvision_net(
    *,
    num_classes: int,
    channels: int,
    size: tuple[int, int],
    arch: Architecture,
    pretrained: bool = False,
    resize: Count | None = 224,
) -> nn.Module:
    """A torchvision network with a new last layer of `num_classes` and a first one of `channels`.

    `resize=null` feeds the images at their own size. `pretrained` takes torchvision's ImageNet weights
    (downloaded once by torchvision; 3 channels only); state their normalisation in model.mean and model.std.
    """
    import torchvision

    if pretrained and channels != 3:
        raise UserError(
            f"model.net.pretrained=true: ImageNet weights take 3 channels, the images have {channels}; "
            "dataset.channels=3 makes them RGB"
        )
    try:
        net = getattr(torchvision.models, arch)(weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise UserError(f"model.net.pretrained=true: the weights cannot be had: {error}") from error
    if channels != 3:
        if arch.startswith("resnet"):
            net.conv1 = _with_channels(net.conv1, channels)
        else:
            net.features.conv0 = _with_channels(net.features.conv0, channels)
    if arch.startswith("resnet"):
        net.fc = nn.Linear(net.fc.in_features, num_classes)
    else:
        net.classifier = nn.Linear(net.classifier.in_features, num_classes)
    return net if resize is None else nn.Sequential(Resize(resize), net)


def _with_channels(conv: Any, channels: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
    )

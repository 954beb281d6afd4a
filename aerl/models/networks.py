"""The paper's two networks, with its layer names so that its `.pth` files load, and torchvision's."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from aerl.errors import UserError
from aerl.types import Count, Positive


class CNN(nn.Module):
    """The paper's 6-layer CNN: 4x4 'same' convolutions, BatchNorm and ReLU after each layer but the last.

    Normalised images (B, channels, H, W) -> logits (B, num_classes). `width` scales the channels of every layer; with
    the paper's 1, 3,706,274 parameters for 10 classes of 3x32x32 images.
    """

    def __init__(self, *, num_classes: int, channels: int, size: tuple[int, int], width: Positive = 1.0) -> None:
        super().__init__()
        widths = [max(1, round(width * n)) for n in (264, 128, 512, 128, 128, 128)]
        hidden = max(1, round(width * 256))
        for i, (fan_in, fan_out) in enumerate(zip([channels, *widths], widths, strict=False), start=1):
            setattr(self, f"conv{i}", nn.Conv2d(fan_in, fan_out, 4, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(fan_out))
        self.fc1 = nn.Linear(widths[-1] * _pixels_left(size, "cnn"), hidden)
        self.bn7 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.pool = nn.MaxPool2d(2)
        self.dropouts = nn.ModuleList(nn.Dropout(p) for p in (0.2, 0.25, 0.35, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 7):
            conv, bn = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            # 'same' for an even kernel is one pixel before and two after: the convolution pads one of each.
            x = F.relu(bn(conv(F.pad(x, (0, 1, 0, 1)))))
            if i % 2 == 0:
                x = self.dropouts[i // 2 - 1](self.pool(x))
        x = F.relu(self.bn7(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(self.dropouts[3](x))
        return logits


class AliCNN(nn.Module):
    """The paper's smaller network: 3x3 convolutions 32, 64 | 128 | 128, no BatchNorm, two linear layers.

    Normalised images (B, channels, H, W) -> logits (B, num_classes). 2,349,258 parameters for 10 classes of 3x32x32
    images.
    """

    def __init__(self, *, num_classes: int, channels: int, size: tuple[int, int], hidden: Count = 1024) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * _pixels_left(size, "alicnn"), hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.25)
        self.dropout_fc = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout(self.pool(x))
        x = self.pool(F.relu(self.conv3(x)))
        x = self.dropout(self.pool(F.relu(self.conv4(x))))
        logits: Tensor = self.fc2(self.dropout_fc(F.relu(self.fc1(x.flatten(1)))))
        return logits


def _pixels_left(size: tuple[int, int], model: str) -> int:
    """The number of pixels of the feature map after three 2x2 poolings."""
    height, width = size
    if min(size) < 8:
        raise UserError(f"model={model}: {height}x{width} images are too small; use dataset.size=8 or more")
    return (height // 8) * (width // 8)


def torchvision_net(
    *,
    num_classes: int,
    channels: int,
    size: tuple[int, int],
    arch: Literal["resnet18", "resnet50", "densenet121"],
    pretrained: bool = False,
    resize: Count | None = 224,
) -> nn.Module:
    """A torchvision network with a new last layer, and a new first one unless the images have 3 channels.

    `resize` (bilinear, antialiased) is inside the model, so that an attack perturbs the dataset's own pixels; null
    means their own size. `pretrained` loads torchvision's ImageNet weights (3 channels only); set their normalisation
    with model.mean and model.std.
    """
    import torchvision
    from torchvision.transforms import Resize

    if pretrained and channels != 3:
        raise UserError(
            f"model.net.pretrained=true: needs 3 channels, the images have {channels}; use dataset.channels=3"
        )
    try:
        net = getattr(torchvision.models, arch)(weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise UserError(f"model.net.pretrained=true: cannot download the weights: {error}") from error
    first, last = ("features.conv0", "classifier") if arch == "densenet121" else ("conv1", "fc")
    if channels != 3:
        conv = net.get_submodule(first)
        new = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        net.set_submodule(first, new)
    net.set_submodule(last, nn.Linear(net.get_submodule(last).in_features, num_classes))
    return net if resize is None else nn.Sequential(Resize([resize, resize]), net)

"""The paper's two convolutional networks, with its layer names, so that its `.pth` files load."""

from torch import Tensor, nn
from torch.nn import functional as F

from aerl.types import Count, Positive, UserError


def _side(size: tuple[int, int], name: str) -> tuple[int, int]:
    """The feature map's size after three 2x2 poolings, or a UserError if nothing is left of it."""
    height, width = (side // 8 for side in size)
    if height < 1 or width < 1:
        raise UserError(
            f"model={name}: {size[0]}x{size[1]} images are too small for its three 2x2 poolings; "
            "it needs 8x8 or more (dataset.size=8 resizes)"
        )
    return height, width


class CNN(nn.Module):
    """The paper's 6-layer CNN: 4x4 'same' convolutions, BatchNorm and ReLU after each but the last layer.

    3,706,274 parameters for 10 classes of 3x32x32 images, 3,729,404 for 100.
    Input (B, channels, H, W), normalised; output logits (B, num_classes).
    `width` scales the number of channels of every layer (1 is the paper's).
    """

    def __init__(self, *, num_classes: int, channels: int, size: tuple[int, int], width: Positive = 1.0) -> None:
        super().__init__()
        height, breadth = _side(size, "cnn")
        wide = [max(1, round(width * n)) for n in (264, 128, 512, 128, 128, 128)]
        hidden = max(1, round(width * 256))
        for i, (fan_in, fan_out) in enumerate(zip([channels, *wide], wide, strict=False), start=1):
            setattr(self, f"conv{i}", nn.Conv2d(fan_in, fan_out, 4, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(fan_out))
        self.fc1 = nn.Linear(wide[-1] * height * breadth, hidden)
        self.bn7 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropouts = nn.ModuleList(nn.Dropout(p) for p in (0.2, 0.25, 0.35, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 7):
            conv, bn = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            # 'same' for an even kernel is one pixel before and two after: the convolution pads one of each
            x = self.relu(bn(conv(F.pad(x, (0, 1, 0, 1)))))
            if i % 2 == 0:
                x = self.dropouts[i // 2 - 1](self.pool(x))
        x = self.relu(self.bn7(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(self.dropouts[3](x))
        return logits


class AliCNN(nn.Module):
    """The paper's smaller network: 3x3 convolutions 32, 64 | 128 | 128, no BatchNorm, two linear layers.

    2,349,258 parameters for 10 classes of 3x32x32 images, 2,441,508 for 100.
    Input (B, channels, H, W), normalised; output logits (B, num_classes).
    """

    def __init__(self, *, num_classes: int, channels: int, size: tuple[int, int], hidden: Count = 1024) -> None:
        super().__init__()
        height, breadth = _side(size, "alicnn")
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * height * breadth, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.25)
        self.dropout_fc = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        x = self.dropout(self.pool(x))
        x = self.pool(self.relu(self.conv3(x)))
        x = self.dropout(self.pool(self.relu(self.conv4(x))))
        logits: Tensor = self.fc2(self.dropout_fc(self.relu(self.fc1(x.flatten(1)))))
        return logits

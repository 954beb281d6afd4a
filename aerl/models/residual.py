"""Residual networks and a vision transformer for small images, as the literature on robustness trains them."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from aerl.errors import UserError
from aerl.types import Count, Probability


def resnet18_cifar(*, num_classes: int, channels: int) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: a 3x3 convolution of stride 1, no pooling.

    11,173,962 parameters for 10 classes of 3 channels (He et al. 2016a).
    """
    from torchvision.models import resnet18

    net: nn.Module = resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    net.maxpool = nn.Identity()
    return net


class _Block(nn.Module):
    """Two 3x3 convolutions, each after its BatchNorm and ReLU."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(fan_in), nn.BatchNorm2d(fan_out)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = stride == 1 and fan_in == fan_out
        self.shortcut = None if same else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(out)
        changed: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out)))))
        return x + changed


class PreActResNet(nn.Module):
    """A pre-activation residual network (He et al. 2016b): stages of `blocks` blocks, of `widths` channels.

    Normalised images (B, channels, H, W) -> logits (B, num_classes). Each stage but the first halves the sides. By
    default PreActResNet-18 with the BatchNorm at the end that Wong et al. 2020 and Rice et al. 2020 use, 11,172,170
    parameters for 10 classes of 3 channels.
    """

    def __init__(
        self, *, num_classes: int, channels: int, stem: Count = 64, widths: Sequence[Count] = (64, 128, 256, 512),
        blocks: Count = 2, dropout: Probability = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        fan_in = stem
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_Block(fan_in, width, 2 if stage > 0 and block == 0 else 1, dropout))
                fan_in = width
        self.blocks, self.bn, self.fc = nn.Sequential(*layers), nn.BatchNorm2d(fan_in), nn.Linear(fan_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class WideResNet(PreActResNet):
    """WRN-depth-width (Zagoruyko & Komodakis 2016), `depth` = 6 n + 4.

    WRN-28-10 has 36,479,194, WRN-34-10 46,160,474 parameters for 10 classes of 3 channels. Raises UserError for
    another depth.
    """

    def __init__(
        self, *, num_classes: int, channels: int, depth: Count = 28, width: Count = 10, dropout: Probability = 0.0
    ) -> None:
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"depth={depth}: expected 6 n + 4: 10, 16, 22, 28, 34, 40, ...")
        widths = [16 * width, 32 * width, 64 * width]
        super().__init__(
            num_classes=num_classes, channels=channels, stem=16, widths=widths, blocks=(depth - 4) // 6, dropout=dropout
        )


def vit(
    *, num_classes: int, channels: int, size: tuple[int, int], patch: Count = 4, layers: Count = 6, heads: Count = 4,
    hidden: Count = 256, mlp: Count = 512, dropout: Probability = 0.0,
) -> nn.Module:  # fmt: skip
    """torchvision's vision transformer (Dosovitskiy et al. 2021) in a size for small images.

    Raises UserError for images that `patch` does not divide into squares, or `hidden` that `heads` does not divide.
    """
    from torchvision.models.vision_transformer import VisionTransformer

    height, width = size
    if height != width or height % patch:
        raise UserError(f"model.net.patch={patch}: must divide the side of square images; these are {height}x{width}")
    if hidden % heads:
        raise UserError(f"model.net.heads={heads}: must divide model.net.hidden={hidden}")
    net: nn.Module = VisionTransformer(
        image_size=height, patch_size=patch, num_layers=layers, num_heads=heads, hidden_dim=hidden, mlp_dim=mlp,
        dropout=dropout, num_classes=num_classes,
    )  # fmt: skip
    if channels != 3:
        net.conv_proj = nn.Conv2d(channels, hidden, patch, patch)
    return net

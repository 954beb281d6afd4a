"""Gradients for operations that have none: `aerl.attacks.straight_through`."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.io import decode_jpeg, encode_jpeg

from aerl.attacks.straight_through import straight_through


def levels(x: Tensor) -> Tensor:
    return (x * 15).round() / 15


def in_place(x: Tensor) -> Tensor:
    return (x * 15).round_() / 15


def integers(x: Tensor) -> Tensor:
    return (x * 255).to(torch.uint8).float() / 255


def bits(x: Tensor) -> Tensor:
    return ((x * 255).byte() >> 4 << 4).float() / 255


def floor_division(x: Tensor) -> Tensor:
    return (x * 255).int() // 16 * 16 / 255


def rounding_mode(x: Tensor) -> Tensor:
    return torch.div(x, 0.1, rounding_mode="floor") * 0.1


def table(x: Tensor) -> Tensor:
    return torch.linspace(0, 1, 17)[torch.bucketize(x, torch.linspace(0, 1, 16))]


def sign(x: Tensor) -> Tensor:
    return (x - 0.5).sign()


def comparison(x: Tensor) -> Tensor:
    return (x > 0.5).float()


def choice(x: Tensor) -> Tensor:
    return torch.where(x < 0.5, 0.0, 1.0)


def detached(x: Tensor) -> Tensor:
    return x.detach()


def data(x: Tensor) -> Tensor:
    return x.data * 1.0


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


@torch.inference_mode()
def in_inference_mode(x: Tensor) -> Tensor:
    return x * 2


def in_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.round(x.detach().numpy() * 7) / 7)


def in_numpy_by_image(x: Tensor) -> Tensor:
    return torch.stack([torch.tensor(np.round(np.asarray(each.detach()) * 7) / 7) for each in x])


def pil(x: Tensor) -> Tensor:
    images = []
    for image in (x.permute(0, 2, 3, 1) * 255).byte():
        file = io.BytesIO()
        Image.fromarray(image.numpy()).save(file, "jpeg", quality=90)
        images.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def jpeg(x: Tensor) -> Tensor:
    return torch.stack([decode_jpeg(encode_jpeg(image)) for image in (x * 255).byte()]).float() / 255


CUTS = [
    levels, in_place, integers, bits, floor_division, rounding_mode, table, sign, comparison, choice, detached, data,
    without_grad, in_inference_mode, in_numpy, in_numpy_by_image, pil, jpeg,
]  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.__name__)
def test_what_is_cut_off_gets_the_gradient_of_the_identity(cut, x):
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    plain = cut(x)
    blind = torch.zeros_like(x)
    if plain.requires_grad:
        blind = torch.autograd.grad((plain * weights).sum(), x)[0]
    assert blind.count_nonzero() == 0
    with straight_through() as repairs:
        value = cut(x)
        gradient = torch.autograd.grad((value * weights).sum(), x)[0]
    assert torch.equal(value, plain)
    assert repairs
    assert torch.cosine_similarity(gradient.flatten(), weights.flatten(), dim=0) > 0.999
    assert torch.from_numpy.__module__ != __name__ and not hasattr(x, "_aerl_carrier")


def net_with_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(4)
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = x.flatten(1, 2)
        return self.inner(x, x, x)[0].mean(1)


class HandWritten(nn.Module):
    """Operations that look like cuts, on the way of no gradient."""

    def forward(self, x):
        top = x.flatten(1).topk(3, dim=1)
        x = torch.where(x > 0.5, x, 0.1 * x).clamp(0, 0.9) * (torch.arange(16) % 2)
        return x.flatten(1)[:, :4] + top.values[:, :1] + x.flatten(1).sort(1, descending=True)[0][:, :4]


@pytest.mark.parametrize("make", [net_with_batchnorm, Attention, HandWritten])
def test_a_model_without_cuts_keeps_its_gradients_and_needs_no_repairs(make, x):
    torch.manual_seed(0)
    net = make().eval()
    plain = net(x)
    expected = torch.autograd.grad(plain.square().sum(), x)[0]
    with straight_through() as repairs:
        value = net(x)
    assert torch.equal(value, plain)
    assert torch.equal(torch.autograd.grad(value.square().sum(), x)[0], expected)
    assert not repairs


def test_buffers_that_a_model_updates_keep_no_graph(x):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
            return (x - self.mean.view(3, 1, 1)).flatten(1)[:, :2]

    net = Counting()
    for _ in range(2):
        with straight_through():
            torch.autograd.grad(net(x).sum(), x)
    assert not net.mean.requires_grad

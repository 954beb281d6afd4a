"""Small networks and images for the tests of attacks."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from aerl.attacks import SampleGenerator, evaluating


class Through(nn.Module):
    """`change` of the logits of `inner`."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.change(self.inner(x))


class Recording(nn.Module):
    """A model that records its inputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x)
        return self.inner(x)


class Linear(nn.Module):
    """Logits W x, whose distance to the decision boundary between y and k is known in closed form."""

    def __init__(self, classes, unlikely=0):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        # Rows of unequal length: the second likeliest class is not always the nearest.
        lengths = torch.linspace(1, 3, classes)[:, None]
        weight = torch.randn(classes, 108, generator=generator) * lengths
        # Losses that compare several logits get more classes, all far away.
        self.weight = nn.Parameter(torch.cat([weight, torch.zeros(unlikely, 108)]))
        self.bias = nn.Parameter(torch.cat([torch.zeros(classes), torch.full([unlikely], -1000.0)]))

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T + self.bias

    @torch.no_grad()
    def distances(self, x, y, norm):
        """(B,) from each image to the nearest other class."""
        logits = self(x).double()
        gap = logits.gather(1, y[:, None]) - logits
        difference = (self.weight[y][:, None] - self.weight[None]).double()
        dual = difference.norm(2, dim=2) if norm == "L2" else difference.abs().sum(2)
        return (gap / dual).scatter(1, y[:, None], torch.inf).amin(1)


def small_net(classes=4, dtype=torch.float32):
    """A convolutional network with batch normalisation and dropout, at random weights."""
    torch.manual_seed(0)
    features = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.5)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(8 * 9, classes)).to(dtype)


def wavy_net(classes=4):
    """A network whose loss goes up and down along every direction."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(108, 32))
    with torch.no_grad():
        inner[1].weight *= 20
    return nn.Sequential(Through(inner, torch.sin), nn.Linear(32, classes))


def images(count=24, dtype=torch.float32, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(1)
    return (low + (high - low) * torch.rand(count, 3, 6, 6, generator=generator)).to(dtype)


def digits_net(classes, epochs, unseen=0):
    """A model in eval mode trained on the first `classes` digits, with those images (N, 1, 8, 8) and labels;
    or, if some are to be `unseen`, with these instead."""
    digits = load_digits(n_class=classes)
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    seen = len(x) - unseen
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        features = (
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
        )
        model = nn.Sequential(*features, nn.Flatten(), nn.Linear(512, classes))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(seen).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        optimizer.zero_grad()
    return (model.eval(), x[seen:], y[seen:]) if unseen else (model.eval(), x, y)


@torch.no_grad()
def predictions(model, x):
    with evaluating(model):
        return model(x).argmax(1)


def wrong(model, x, y):
    return predictions(model, x) != y


def noise_for(x, seed=0):
    return SampleGenerator.for_images(x, seed)


def sizes(delta, norm):
    return delta.flatten(1).double().norm(2 if norm == "L2" else torch.inf, dim=1)


def state_of(model):
    """Modes, trainability, gradients and values, to compare before and after."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
        {name: value.tolist() for name, value in model.state_dict().items()},
    )


def partly_trained(model):
    """Training mode with one layer in eval mode, one parameter frozen, and gradients waiting."""
    model.train()[1].eval()
    model[0].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    return model

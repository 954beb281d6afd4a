"""Recipes of conf/recipe: aerl's `fit` with them, against the same training written by hand in PyTorch, in turns.

The hand-written loops follow the sources that the YAML files name, on images that stay on the device: they
crop and flip a batch as one, record nothing, and check nothing. Their attacks run with BatchNorm as in evaluation, like
aerl's, for the same passes on both sides.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import launch
from aerl.attacks import evaluating
from aerl.build import build_recipe
from aerl.config.cli import prepare_words
from aerl.config.compose import read
from aerl.models import Classifier, resnet18_cifar
from aerl.runtime.device import Hardware
from aerl.training.loop import Recipe
from benchmarks.paired import ratio, time_in_turns, timed
from benchmarks.training import random_split, timed_fit

EPS = 8 / 255
_MIXED = "sl with crop and CutMix"
TRAINERS = ("pgd_at", "trades", "mart", "awp", "fast_at", _MIXED)

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def recipe_of(trainer: str, batch_size: int) -> Recipe:
    """As `launch.py dataset=cifar10 trainer=... norm=Linf eps=8/255` trains."""
    words = [f"trainer={trainer}"]
    if trainer == _MIXED:
        augmentation = [f"dataset.augmentation.{word}" for word in ("crop=4", "vflip=0", "translate=0", "cutmix=1")]
        sgd = ("_target_=torch.optim.SGD", "lr=0.1", "momentum=0.9", "weight_decay=5e-4")
        words = ["trainer=sl", *(f"trainer.optimizer.{word}" for word in sgd), "trainer.clip=null", *augmentation]
    words += ["dataset=cifar10", "norm=Linf", "eps=8/255", f"trainer.batch_size={batch_size}"]
    with initialize_config_dir(str(launch.ROOT / "conf"), version_base="1.3"):
        recipe = build_recipe(read(compose("config", overrides=prepare_words(words))))
    assert recipe is not None
    return recipe


def perturbed(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], *, steps: int, size: float) -> Tensor:
    """Linf PGD from a random start, BatchNorm as in evaluation."""
    with evaluating(model):
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(x_adv)), x_adv)
            x_adv = (x_adv.detach() + size * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return x_adv


def pgd_at(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 10, size: float = 2 / 255) -> Tensor:
    x_adv = perturbed(model, x, partial(F.cross_entropy, target=y), steps=steps, size=size)
    return F.cross_entropy(model(x_adv), y)


def trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        target = model(x).softmax(1)

    def divergence(logits: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), target, reduction="sum")

    x_adv = perturbed(model, x, divergence, steps=10, size=0.007)
    clean, attacked = model(x), model(x_adv)
    return F.cross_entropy(clean, y) + 6 * F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="batchmean")


def mart(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x_adv = perturbed(model, x, partial(F.cross_entropy, target=y), steps=10, size=0.007)
    clean, attacked = model(x), model(x_adv)
    p, p_adv = clean.softmax(1), attacked.softmax(1)
    other = p_adv.scatter(1, y[:, None], 0).amax(1)
    boosted = F.cross_entropy(attacked, y) + F.nll_loss((1.0001 - other).log()[:, None], torch.zeros_like(y))
    missed = 1 - p.gather(1, y[:, None]).squeeze(1)
    divergence = F.kl_div((p_adv + 1e-12).log(), p, reduction="none").sum(1)
    return boosted + 5 * (divergence * missed).mean()


def awp(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of pgd_at at weights that were moved up it, which stay moved: `by_hand` moves them back."""
    x_adv = perturbed(model, x, partial(F.cross_entropy, target=y), steps=10, size=2 / 255)
    weights = [p for p in model.parameters() if p.dim() > 1]
    slopes = torch.autograd.grad(F.cross_entropy(model(x_adv), y), weights)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            slope.mul_(0.005 * weight.norm() / slope.norm())
            weight.add_(slope)
    model.moved = list(zip(weights, slopes, strict=True))
    return F.cross_entropy(model(x_adv), y)


_LOSSES: dict[str, Loss] = {
    "pgd_at": pgd_at, "trades": trades, "mart": mart, "awp": awp,
    "fast_at": partial(pgd_at, steps=1, size=10 / 255),
    _MIXED: lambda model, x, y: F.cross_entropy(model(x), y),
}  # fmt: skip


def by_hand(trainer: str, model: nn.Module, hardware: Hardware, batch_size: int) -> Callable[[], None]:
    """One step a call, with SGD as the recipes have it."""
    loss = _LOSSES[trainer]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    split = random_split(16 * batch_size, 32)
    images, labels = split.images.to(hardware.device), split.labels.to(hardware.device)
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    cutmix = v2.CutMix(num_classes=10)

    def step() -> None:
        rows = torch.randint(len(labels), (batch_size,), device=hardware.device)
        x, y = augment(images[rows]), labels[rows]
        x = x.to(memory_format=hardware.memory_format).float().div_(255)
        if trainer == _MIXED:
            x, y = cutmix(x, y)
        optimizer.zero_grad()
        with hardware.autocast():
            value = loss(model, x, y)
        value.backward()
        for weight, change in model.__dict__.pop("moved", ()):
            weight.data.sub_(change)
        optimizer.step()

    return step


def measure(hardware: Hardware, rounds: int, scratch: Path, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal): ResNet-18 for small images."""
    gpu = hardware.device.type == "cuda"
    batch_size, steps = (2, 1) if smoke else (128, 20) if gpu else (16, 2)
    candidates: dict[str, Callable[[], object]] = {}
    for trainer in TRAINERS:
        torch.manual_seed(0)
        models = [
            hardware.place(Classifier(resnet18_cifar(num_classes=10, channels=3), (0.5,) * 3, (0.25,) * 3)).train()
            for _ in range(2)
        ]
        many = steps * (4 if trainer in ("fast_at", _MIXED) and not smoke else 1)
        candidates[f"{trainer} hand"] = partial(timed, by_hand(trainer, models[0], hardware, batch_size), many)
        fitted = recipe_of(trainer, batch_size)
        candidates[trainer] = timed_fit(models[1], fitted, hardware, scratch / trainer, many, 32)
    seconds = time_in_turns(candidates, rounds)
    return [
        (
            f"{trainer}, ResNet-18, 32x32, batch {batch_size}: time of a step over the same by hand",
            f"{ratio(seconds[trainer], seconds[f'{trainer} hand']):.2f}",
            "<= 1.05",
        )
        for trainer in TRAINERS
    ]

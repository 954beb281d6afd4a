"""The network of a run, behind its normalisation, where the run computes; tried there before anything depends on it."""

import logging
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from aerl.attacks import attacking, evaluating
from aerl.config.schema import Config
from aerl.config.targets import bind
from aerl.data import DataSplits, to_unit
from aerl.models.classifier import Classifier
from aerl.models.probe import keeping_buffers
from aerl.runtime import ddp
from aerl.runtime.device import Hardware, seed_from
from aerl.types import UserError, foreign_code

log = logging.getLogger("aerl")

# What a network's constructor is given of the dataset, if it takes it; `size` is (height, width).
SIZES = ("num_classes", "channels", "size")


def build_model(config: Config, data: DataSplits, machine: Hardware, batch: int = 0) -> Classifier:
    """The network, initialised from the run's seed, behind its normalisation, on the run's device.

    `batch` is how many images a step of training takes; 0 where nothing is trained. A network that cannot compute on
    channels_last images gets contiguous ones. Raises UserError for one that fails on images of the dataset.
    """
    key, net = f"model={config.model.name}", build_net(config, data, config.seed, "weights")
    mean = _per_channel("mean", config.model.mean, data.mean)
    std = [
        value or 1.0 for value in _per_channel("std", config.model.std, data.std)
    ]  # 0 of a channel without variation
    model = Classifier(net, mean, std)
    with foreign_code(key, remedy=f"moved to {machine.device}"):
        machine.place(model)
    try:
        _try(model, key, data, machine, batch)
    except UserError as error:
        if not machine.channels_last:
            raise
        model.contiguous = True
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        _try(model, key, data, machine, batch)
        log.warning("%s; it computes in the contiguous layout instead of hardware.channels_last=true", error)
    return model


def build_net(config: Config, data: DataSplits, *words: int | str) -> nn.Module:
    """The bare network, its random weights drawn from a seed of `words`."""
    channels, height, width = data.image_shape
    sizes = dict(zip(SIZES, (data.num_classes, channels, (height, width)), strict=True))
    torch.manual_seed(seed_from(*words))
    make = bind(config.model.net, "model.net", given=sizes)
    with foreign_code(f"model.net: {_call(make)}"):
        net = make()
    if not isinstance(net, nn.Module):
        raise UserError(f"model.net._target_={config.model.net['_target_']}: gave a {type(net).__name__}, not a module")
    if any(map(is_lazy, net.parameters())):  # they get their shapes and values from a first batch
        with foreign_code("model.net"), evaluating(net), torch.no_grad():
            net(torch.zeros(2, *data.image_shape))
    return net


def _call(bound: partial[Any]) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in bound.keywords.items())
    return f"{getattr(bound.func, '__name__', bound.func)}({settings})"


def _per_channel(key: str, stated: list[float] | None, own: tuple[float, ...]) -> list[float]:
    values = list(own) if stated is None else stated
    if len(values) not in (1, len(own)):
        raise UserError(f"model.{key}={values}: the images have {len(own)} channels; give one value for each")
    return values


def _try(model: Classifier, key: str, data: DataSplits, machine: Hardware, batch: int) -> None:
    """Two images, a single one, and with a `batch` a step of training without the step; UserError if one fails."""
    blank = torch.zeros(2, *data.image_shape, dtype=torch.uint8, device=machine.device)
    images = to_unit(blank, machine.memory_format)
    shape = "x".join(map(str, data.image_shape))
    too_small = f"given 2 images of {shape}; dataset.size= resizes them, torchvision's networks also model.net.resize="
    with torch.random.fork_rng([machine.device] if images.is_cuda else []), keeping_buffers(model):
        with attacking(model), torch.no_grad():
            with foreign_code(key, remedy=too_small):
                classes = model(images).shape[1]
            with foreign_code(key, remedy="given a single image, as attacks end on one; squeeze() drops its dimension"):
                model(images[:1])
        if classes != data.num_classes:
            raise UserError(f"{key}: gives {classes} logits for {data.num_classes} classes")
        if not batch:
            return
        # On a GPU, BatchNorm sees the whole batch of all processes.
        each = batch if images.is_cuda else max(1, batch // ddp.world_size())
        remedy = f"given a batch of {min(2, each)} in training mode, where BatchNorm needs trainer.batch_size=2 or more"
        with evaluating(model), foreign_code(key, remedy=remedy):
            model.train()
            with machine.autocast():
                logits = model(images[:each])
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not (learning and logits.requires_grad):
                raise UserError(f"{key}: its logits do not depend on a parameter that learns: it cannot be trained")
            torch.autograd.grad(logits.sum(), learning, allow_unused=True)

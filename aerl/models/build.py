"""The network of a run, initialised, behind its normalisation, on the run's device, and tried on a few images."""

import logging

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from aerl.attacks import attacking, evaluating
from aerl.config.schema import Config
from aerl.config.targets import bind
from aerl.data import DataSplits, to_unit
from aerl.errors import UserError, foreign_code
from aerl.models.classifier import Classifier
from aerl.models.probe import keeping_buffers
from aerl.runtime import ddp
from aerl.runtime.device import Hardware, seed_from

log = logging.getLogger("aerl")

# What a network's constructor gets of the dataset, if it takes it; `size` is (height, width).
SIZES = ("num_classes", "channels", "size")


def build_model(config: Config, data: DataSplits, machine: Hardware, batch: int = 0) -> Classifier:
    """The network with weights from the run's seed. `batch` is the training batch size, 0 without training.

    A network that cannot compute on channels_last images gets contiguous ones. Raises UserError for one that fails on
    images of the dataset.
    """
    key, net = f"model={config.model.name}", build_net(config, data, config.seed, "weights")
    mean = _per_channel("mean", config.model.mean, data.mean)
    std = _per_channel("std", config.model.std, data.std)
    model = Classifier(net, mean, [value or 1.0 for value in std])  # 0: a constant channel
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
        log.warning("%s; using the contiguous layout instead of hardware.channels_last=true", error)
    return model


def build_net(config: Config, data: DataSplits, *words: int | str) -> nn.Module:
    """The bare network, its random weights drawn from a seed of `words`."""
    channels, height, width = data.image_shape
    sizes = dict(zip(SIZES, (data.num_classes, channels, (height, width)), strict=True))
    torch.manual_seed(seed_from(*words))
    make = bind(config.model.net, "model.net", given=sizes)
    settings = ", ".join(f"{name}={value!r}" for name, value in make.keywords.items())
    with foreign_code(f"model.net: {getattr(make.func, '__name__', make.func)}({settings})"):
        net = make()
    if not isinstance(net, nn.Module):
        target = config.model.net["_target_"]
        raise UserError(f"model.net._target_={target}: returned a {type(net).__name__}, expected a torch.nn.Module")
    if any(map(is_lazy, net.parameters())):  # they get their shapes and values from a first batch
        with foreign_code("model.net"), evaluating(net), torch.no_grad():
            net(torch.zeros(2, *data.image_shape))
    return net


def _per_channel(key: str, stated: list[float] | None, own: tuple[float, ...]) -> list[float]:
    values = list(own) if stated is None else stated
    if len(values) not in (1, len(own)):
        raise UserError(f"model.{key}={values}: expected one value for each of {len(own)} channels")
    return values


def _try(model: Classifier, key: str, data: DataSplits, machine: Hardware, batch: int) -> None:
    """Two images, a single one, and with a `batch` a forward and backward pass in training mode."""
    blank = torch.zeros(2, *data.image_shape, dtype=torch.uint8, device=machine.device)
    images = to_unit(blank, machine.memory_format)
    shape = "x".join(map(str, data.image_shape))
    with torch.random.fork_rng([machine.device] if images.is_cuda else []), keeping_buffers(model):
        with attacking(model), torch.no_grad():
            with foreign_code(key, remedy=f"for 2 images of {shape}; dataset.size= or model.net.resize= resizes them"):
                classes = model(images).shape[1]
            with foreign_code(key, remedy="for a single image"):
                model(images[:1])
        if classes != data.num_classes:
            raise UserError(f"{key}: returned {classes} logits for {data.num_classes} classes")
        if batch:
            # On a GPU, BatchNorm sees the images of all processes.
            images = images[: batch if images.is_cuda else max(1, batch // ddp.world_size())]
            remedy = f"for {len(images)} images in training mode; BatchNorm needs trainer.batch_size=2 or more"
            with evaluating(model), foreign_code(key, remedy=remedy):
                model.train()
                with machine.autocast():
                    logits = model(images)
                trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
                if not (trainable and logits.requires_grad):
                    raise UserError(f"{key}: cannot be trained: no trainable parameter affects its logits")
                torch.autograd.grad(logits.sum(), trainable, allow_unused=True)

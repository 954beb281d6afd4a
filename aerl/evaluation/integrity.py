"""An attack is not trusted: what it returns are copies of images, and the model is as it was."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerl.types import UserError


def adversarial_images(returned: Any, x: Tensor, key: str) -> Iterator[tuple[str, Tensor]]:
    """The parts of what an attack returned for images x (B, C, H, W): each its name, "" for a tensor alone, and a
    copy like x. Raises UserError where it is anything else than images, or has pixels that are not finite."""
    parts = returned if isinstance(returned, dict) else {"": returned}
    if not parts or not all(isinstance(part, str) and re.fullmatch(r"[\w.-]*", part) for part in parts):
        raise UserError(f"{key}: returned parts {list(parts)}: expected names of letters, digits and any of _.-")
    for part, images in parts.items():
        where = f"{key}: returned " + (f"as {part} " if part else "")
        if not isinstance(images, Tensor):
            raise UserError(f"{where}a {type(images).__name__}: expected a tensor of images, or a dict of them")
        if images.shape != x.shape:
            raise UserError(f"{where}images of shape {tuple(images.shape)}: expected {tuple(x.shape)}")
        if not images.is_floating_point():
            raise UserError(f"{where}images of {images.dtype}: expected torch.float32, in [0, 1]")
        own = torch.empty_like(x)
        with torch.no_grad():
            own.copy_(images)
        if bad := int((~own.isfinite()).flatten(1).any(1).sum()):
            raise UserError(f"{where}NaN or infinite pixels in {bad} of {len(x)} images: expected [0, 1]")
        yield part, own


class ModelGuard:
    """Checks that attacks leave the parameters, buffers and layers of `model` as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.weights = model, _copies(model)

    @contextmanager
    def unaltered(self, x: Tensor, key: str) -> Iterator[None]:
        """UserError, under `key`, if the code inside alters the model. x are images that may be put through it.

        Values are compared, not tensors' versions, which `.data` does not change; that costs less than a pass. A
        buffer that the model itself changes in every pass (BatchNorm that is still in training) is allowed.
        """
        layers = _layers(self.model)
        yield
        altered = _differing(_tensors(self.model), self.weights)
        if altered and set(altered) <= dict(self.model.named_buffers()).keys():
            before = _copies(self.model)
            with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
                self.model(x)
            own = _differing(_tensors(self.model), before)
            self.weights |= {name: before[name] for name in own}
            altered = [name for name in altered if name not in own]
        if _layers(self.model) != layers:
            altered.append("layers, their modes or hooks")
        if altered:
            raise UserError(f"{key}: altered the model ({altered[0]}): expected to leave it as it is")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def _layers(model: nn.Module) -> list[Any]:
    """Of every layer what an attack could exchange: itself, its mode, what it computes and its hooks."""
    return [
        (name, id(layer), layer.training, vars(layer).get("forward"), vars(type(layer)).get("forward"),
         [tuple(hooks) for hooks in (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks)])
        for name, layer in model.named_modules()
    ]  # fmt: skip


def _differing(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    """The names under which the two do not have the same values, in the same form."""
    names = list({**tensors, **others})
    return [name for name in names if not _same(tensors.get(name), others.get(name))]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())

"""Attacks of other libraries as aerl's: `attack(model, x, y, *, generator)`. None of them is imported here."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aerl.attacks.modes import warn
from aerl.attacks.projections import norms
from aerl.types import ORDERS, Norm


def as_attack(attack: Callable[..., Any], norm: Norm, eps: float) -> Callable[..., Any]:
    """An attack that takes `generator`, in a run with this threat model; one of aerl's kind is returned as is.

    `attack` is a function of (model, x, y) without `generator`; an attack of torchattacks, which attacks the model that
    it was made with, or its class with settings, which attacks the run's; an attack of foolbox; or a function of
    adversarial-library, with its settings.
    """
    target = attack.func if isinstance(attack, functools.partial) else attack
    of_class = inspect.isclass(target)
    kind: type = target if isinstance(target, type) else type(target)
    bases = {f"{base.__module__}.{base.__name__}" for base in inspect.getmro(kind)}
    if "torchattacks.attack.Attack" in bases:
        stated = getattr(attack, "keywords", {}) if of_class else vars(attack)
        own: Any = "L2" if kind.__name__.endswith("L2") else stated.get("norm", norm)
        call = (lambda model, x, y: attack(model)(x, y)) if of_class else (lambda model, x, y: attack(x, y))
        return _within(call, target, own if own in ORDERS else norm, float(stated.get("eps", eps)))
    if "foolbox.attacks.base.Attack" in bases:
        found = attack() if of_class else attack
        order = getattr(getattr(found, "distance", None), "p", None)
        own = next((name for name, p in ORDERS.items() if p == order), norm)

        def attack_of_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Any:
            from foolbox import PyTorchModel  # type: ignore[import-not-found]

            return found(PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=eps)[1]

        return _within(attack_of_foolbox, target, own, eps)
    if str(getattr(target, "__module__", "")).startswith("adv_lib."):
        return _within(attack, target, norm, eps)
    if of_class or _takes_generator(attack):
        return attack

    @functools.wraps(attack)  # the signature states its norm and eps
    def without_generator(model: nn.Module, x: Tensor, y: Tensor, *, generator: object) -> Any:
        return attack(model, x, y)

    without_generator.__module__ = getattr(target, "__module__", kind.__module__)
    return without_generator


def name_of(attack: Callable[..., Any]) -> str:
    """A name for an attack in tables: that of its function or class."""
    target = attack.func if isinstance(attack, functools.partial) else attack
    return re.sub(r"\W", "", str(getattr(target, "__name__", type(target).__name__))).lower()


def _takes_generator(attack: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == "generator" or p.kind is p.VAR_KEYWORD for p in parameters)


def _within(call: Callable[..., Any], target: Any, norm: Norm, eps: float) -> Callable[..., Tensor]:
    """An attack that may return images outside of the ball, such as the nearest adversarial ones: they do not count."""
    threat = norm, eps

    def attack(
        model: nn.Module, x: Tensor, y: Tensor, *, generator: object, norm: Norm = threat[0], eps: float = threat[1]
    ) -> Tensor:
        found = torch.as_tensor(call(model, x, y)).detach().to(x)
        far = norms(found - x, norm) > eps * (1 + 1e-4) + 1e-6
        if far.any():
            warn(f"its images that are farther than eps={eps:.6g} from the original do not count")
        return torch.where(far, x, found)

    attack.__module__ = getattr(target, "__module__", type(target).__module__)
    return attack

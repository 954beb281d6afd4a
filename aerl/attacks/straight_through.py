"""Straight-through gradients for operations that have none (BPDA, Athalye et al. 2018, section 4.1), from outside."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "bernoulli", "heaviside"}
_CASTS = {"to", "type", "type_as", "int", "long", "short", "byte", "char", "bool", "quantize_per_tensor"}
_GREATER = {"gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"}
_LESS = {"lt", "le", "less", "less_equal", "__lt__", "__le__"}
_BUCKETS = {"bucketize": 0, "searchsorted": 1}  # the place of the values among the arguments
_FLOOR_DIVISIONS = {"floor_divide", "__floordiv__"}
_TO_PYTHON = {"numpy", "__array__", "item", "tolist", "__float__", "__int__", "__bool__"}
_FROM_PYTHON = {"tensor", "as_tensor", "asarray"}


@contextmanager
def straight_through() -> Iterator[Counter[str]]:
    """Within it, a forward pass has the same values, and a gradient where an operation would have cut it off.

    The identity stands in for the derivative of rounding, sign and step functions, floor division, casts to integers
    and back (with whatever lies between them, up to a table lookup), comparisons, `detach`, `no_grad`,
    `inference_mode`, and code outside torch that returns an array of the shape that it got. An operation that has a
    gradient keeps it. Yields the number of repairs by operation, empty for a model that needs none.

    What it cannot reach: a `torch.autograd.Function` with a gradient of zero, compiled models, code outside torch that
    changes the shape. Finite differences reach all of them.
    """
    mode = _StraightThrough()
    from_numpy = torch.from_numpy  # the one way into torch that modes do not see
    with patch.object(torch, "from_numpy", lambda array: mode.returned(from_numpy(array), "numpy")), mode:
        yield mode.repairs


def before_softmax(output: Tensor) -> Tensor:
    """The logits, if a model that was called within `straight_through` returned their softmax; else its output."""
    logits: Tensor = getattr(output, "_aerl_logits", output)
    return logits


class _Identity(torch.autograd.Function):
    """`value`, with the gradient going to `carrier` of the same shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


class _StraightThrough(TorchFunctionMode):
    """A tensor that lost its gradient, because it holds integers for instance, has a `carrier`: a tensor of floats that
    stands for it when gradients are computed. The next floats that are computed from it are attached to the carrier."""

    def __init__(self) -> None:
        super().__init__()
        self.repairs: Counter[str] = Counter()
        self.exported: list[Tensor] = []  # what left torch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _FROM_PYTHON:
            return self.returned(func(*args, **kwargs), name)
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(_depends(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        if name in _TO_PYTHON:
            self.exported.append(_lifted(tensors[0]))
            return func(tensors[0].detach(), *args[1:], **kwargs)
        target, in_place = tensors[0], name.endswith("_") and not name.endswith("__")
        if not torch.is_grad_enabled():
            if in_place and not _depends(target):
                return func(*args, **kwargs)  # a buffer that the model updates
            self.repairs["no_grad"] += 1
        with torch.inference_mode(False), torch.enable_grad():
            if name in ("detach", "detach_") or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
                self.repairs["detach"] += 1
                return target
            if name.removesuffix("_") in _STEPS and target.requires_grad:
                self.repairs[name] += 1
                with torch.no_grad():
                    value = func(target.clone(), *args[1:], **kwargs)
                value = _Identity.apply(value, target)
                return target.copy_(value) if in_place else value
            result = func(*args, **kwargs)
            if name in _FLOOR_DIVISIONS or kwargs.get("rounding_mode"):
                result = result.detach()  # it has no derivative, or zero
            found, results = tree_flatten(result)
            if all(not isinstance(each, Tensor) or each.requires_grad for each in found):
                if name == "softmax":
                    result._aerl_logits = tensors[0]
                return result
            lifted_args, lifted_kwargs = tree_unflatten([_lifted(leaf) for leaf in leaves], form)
            carriers = self._carriers(func, name, lifted_args, lifted_kwargs, [_carrier(each) for each in tensors])
            return tree_unflatten([self._carry(each, carriers, i, name) for i, each in enumerate(found)], results)

    def _carriers(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        own: list[Tensor | None],
    ) -> list[Tensor]:
        """What stands for the results of an operation: one for each, or one for all, or none."""
        if name in _GREATER:
            return [args[0] - args[1]]
        if name in _LESS:
            return [args[1] - args[0]]
        if name in _BUCKETS:
            return [args[_BUCKETS[name]]]
        if name in _FLOOR_DIVISIONS or kwargs.get("rounding_mode"):
            return [torch.true_divide(*args[:2])]
        carried = [each for each in own if each is not None]
        if not carried:
            return [args[0]] if name in _CASTS else []
        if name == "where":  # between two constants
            condition, yes, no = args
            return [condition * (yes - no)]
        try:
            results = [each for each in tree_flatten(func(*args, **kwargs))[0] if isinstance(each, Tensor)]
        except (RuntimeError, TypeError, IndexError):  # not for floats: bits, table lookups, codecs
            return carried[:1]
        return results if all(each.requires_grad for each in results) else carried[:1]

    def _carry(self, value: Any, carriers: list[Tensor], place: int, name: str) -> Any:
        if not isinstance(value, Tensor) or value.requires_grad or not carriers:
            return value
        carrier = carriers[min(place, len(carriers) - 1)]
        if not carrier.requires_grad:
            return value
        if value.is_floating_point() and value.shape == carrier.shape:
            self.repairs[name] += 1
            return _Identity.apply(value, carrier)
        value._aerl_carrier = carrier  # type: ignore[attr-defined]
        return value

    def returned(self, value: Tensor, name: str) -> Tensor:
        """A tensor from outside torch, attached to the first one of its shape that left torch and has not returned."""
        place = next((i for i, each in enumerate(self.exported) if each.shape == value.shape), None)
        if place is None:
            return value
        result: Tensor = self._carry(value, [self.exported.pop(place)], 0, name)
        return result


def _carrier(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "_aerl_carrier", None)


def _depends(tensor: Tensor) -> bool:
    return tensor.requires_grad or _carrier(tensor) is not None


def _lifted(leaf: Any) -> Any:
    """The carrier of a tensor that has one; anything else unchanged."""
    carrier = _carrier(leaf) if isinstance(leaf, Tensor) else None
    return leaf if carrier is None else carrier

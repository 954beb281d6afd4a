"""What a model does that attacks do not expect of one: said before its robustness is believed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from aerl.attacks import attacking
from aerl.runtime.device import is_out_of_memory
from aerl.types import UserError, first_line


def probe(model: nn.Module, x: Tensor) -> list[str]:
    """One sentence for each thing about `model` that would make its robustness look other than it is.

    `x` float32 (B, C, H, W) in [0, 1], on the model's device; two images or more, of the kind it is for (a BatchNorm
    that is still training takes no batch of one).
    Looks at it as every attack does, in eval mode and float32. Log-probabilities are logits, too, and not
    remarked upon. The model's modes, buffers and gradients and the random state are as before afterwards.
    """
    devices = [x.device] if x.is_cuda else []
    with attacking(model), torch.random.fork_rng(devices), keeping_buffers(model):
        return list(_doubts(model, x.detach()))


def drawn(one: nn.Module, other: nn.Module) -> list[str]:
    """The same network made from two seeds, which is to bring its own weights: one sentence if it does not."""
    state = other.state_dict()
    random = [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, state[name])]
    if not random:
        return []
    return [
        f"{len(random)} of its {len(state)} tensors (the first is {random[0]}) are drawn at random: it is not, or not "
        "wholly, trained; ask its target for trained weights (often pretrained=true or weights=...), or give "
        "checkpoint=FILE"
    ]


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """A BatchNorm in training counts what it is shown: give the buffers their values back afterwards."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            with torch.no_grad():
                setattr(module, name, buffer.copy_(value))


def _doubts(model: nn.Module, x: Tensor) -> Iterator[str]:
    active = [
        name for name, module in model.named_modules() if module.training and isinstance(module, _NormBase | _DropoutNd)
    ]
    if active:
        yield (
            f"{len(active)} of its BatchNorm and Dropout layers (the first is {active[0]}) are in training mode "
            "although eval() was called: it is not the model that was trained; let eval() reach them"
        )
    with torch.no_grad():
        logits, again, fewer = model(x), model(x), model(x[: -(-len(x) // 2)])
    if not logits.isfinite().all():
        yield (
            "its outputs are not finite: predictions and gradients mean nothing; check its weights, and that it "
            "takes images in [0, 1]"
        )
        return
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        yield (
            "its outputs are probabilities: the cross-entropy of a softmax of a softmax hides gradients, and the "
            "model looks more robust than it is; give its logits, without the softmax"
        )
    if _differ(logits, again, 1e-4):
        yield (
            "two passes over the same images differ, so it is random: an attack aims at one draw and is judged by "
            "another; fix what it draws, or take attack.autoattack.version=rand, which averages over draws"
        )
    elif _differ(logits[: len(fewer)], fewer, 1e-2):
        yield (
            "its output for an image depends on the other images of the batch: what is attacked is the batch, and "
            "evaluation.batch_size changes the result; give BatchNorm its running statistics"
        )
    yield from _gradient_doubts(model, x, constant=bool((logits == logits[:1]).all()))


def _gradient_doubts(model: nn.Module, x: Tensor, *, constant: bool) -> Iterator[str]:
    """A model whose outputs are `constant` has no gradient, and rightly so: a last layer that begins at zero."""
    consequence = "attacks by gradient find nothing, and a robust accuracy from them proves nothing"
    x = x.clone().requires_grad_()
    gradient = None
    try:
        logits = model(x)
        if logits.requires_grad:
            # Any mixture of the logits will do but sums over classes or images, which some models hold constant.
            mixture = torch.linspace(-1, 1, logits.numel(), device=x.device).view_as(logits)
            (gradient,) = torch.autograd.grad(logits, x, mixture, allow_unused=True)
    except Exception as error:  # a backward pass of others can raise anything
        reason = first_line(error)
        if is_out_of_memory(error):
            yield f"its gradient was not probed: {reason}"
            return
        if "deterministic" in reason:  # a matter of the hardware's settings, not of the model
            raise UserError(f"hardware.deterministic=true: {reason}") from error
        yield f"it cannot be differentiated ({reason}): {consequence}; take attacks without gradients (square)"
        return
    if gradient is None:
        yield (
            f"its outputs do not depend on the images as far as autograd sees (no_grad, detach, NumPy inside?): "
            f"{consequence}; let the graph through, or take attacks without gradients (square)"
        )
    elif not gradient.isfinite().all():
        yield f"its gradient is not finite: {consequence}; look for a root or a logarithm of zero inside"
    elif not constant and not gradient.any():
        yield (
            f"its gradient is exactly zero on all {len(x)} images probed (rounding, quantising or saturation "
            f"inside?): {consequence}; make that step differentiable, or take attacks without gradients (square)"
        )


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether outputs differ by more than rounding, which depends on the size of the batch."""
    return bool((one - other).abs().max() > tolerance * one.abs().max())

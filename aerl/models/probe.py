"""What a model does that attacks do not expect: reported before its robustness is believed."""

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

    `x` float32 (B, C, H, W) in [0, 1], on the model's device: two images or more (a BatchNorm that is still training
    takes no batch of one). The model is in eval mode and float32, as under attack. Its modes, buffers and gradients
    and the random state are restored.
    """
    devices = [x.device] if x.is_cuda else []
    with attacking(model), torch.random.fork_rng(devices), keeping_buffers(model):
        return list(_doubts(model, x.detach()))


def drawn(one: nn.Module, other: nn.Module) -> list[str]:
    """One sentence if the same network, made from two seeds, does not bring its own weights."""
    state = other.state_dict()
    random = [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, state[name])]
    if not random:
        return []
    return [
        f"{len(random)} of its {len(state)} tensors (the first is {random[0]}) are drawn at random: it is not trained, "
        "or not completely; ask its target for trained weights (often pretrained=true or weights=...), or give "
        "checkpoint=FILE"
    ]


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers afterwards: a BatchNorm in training counts the images it sees."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            with torch.no_grad():
                setattr(module, name, buffer.copy_(value))


def _doubts(model: nn.Module, x: Tensor) -> Iterator[str]:
    training = [
        name for name, module in model.named_modules() if module.training and isinstance(module, _NormBase | _DropoutNd)
    ]
    if training:
        yield (
            f"{len(training)} of its BatchNorm and Dropout layers (the first is {training[0]}) are in training mode "
            "although eval() was called: it is not the model that was trained; let eval() reach them"
        )
    with torch.no_grad():
        logits, again, fewer = model(x), model(x), model(x[: -(-len(x) // 2)])
    if not logits.isfinite().all():
        yield "its outputs are not finite; check its weights, and that it takes images in [0, 1]"
        return
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():  # log-probabilities are logits, too
        yield (
            "its outputs are probabilities: the softmax of a softmax hides gradients, and the model looks more robust "
            "than it is; give its logits, without the softmax"
        )
    if _differ(logits, again, 1e-4):
        yield (
            "two passes over the same images differ, so it is random: an attack aims at one draw and is scored on "
            "another; fix what it draws, or take attack.autoattack.version=rand, which averages over draws"
        )
    elif _differ(logits[: len(fewer)], fewer, 1e-2):
        yield (
            "its output for an image depends on the other images of the batch, so evaluation.batch_size changes the "
            "result; give BatchNorm its running statistics"
        )
    if doubt := _gradient_doubt(model, x, constant=bool((logits == logits[:1]).all())):
        yield doubt


def _gradient_doubt(model: nn.Module, x: Tensor, *, constant: bool) -> str | None:
    """A model whose outputs are `constant` (a last layer that begins at zero) rightly has no gradient."""
    consequence = "robust accuracy under attacks by gradient proves nothing; take attacks without gradients (square)"
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
            return f"its gradient was not probed: {reason}"
        if "deterministic" in reason:  # a matter of the hardware's settings, not of the model
            raise UserError(f"hardware.deterministic=true: {reason}") from error
        return f"it cannot be differentiated ({reason}): {consequence}"
    if gradient is None:
        return (
            "its outputs do not depend on the images as far as autograd sees (no_grad, detach, NumPy inside?): "
            f"{consequence}"
        )
    if not gradient.isfinite().all():
        return f"its gradient is not finite (a root or a logarithm of zero inside?): {consequence}"
    if not constant and not gradient.any():
        return (
            f"its gradient is exactly zero on all {len(x)} images probed (rounding, quantising or saturation inside?): "
            f"{consequence}"
        )
    return None


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether outputs differ by more than rounding, which depends on the size of the batch."""
    return bool((one - other).abs().max() > tolerance * one.abs().max())

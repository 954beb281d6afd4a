"""Properties of a model that make it look more robust than it is, reported before any attack."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from aerl.attacks import attacking
from aerl.errors import UserError, first_line
from aerl.runtime.device import is_out_of_memory


def probe(model: nn.Module, x: Tensor) -> list[str]:
    """One sentence for each doubt about `model`, in the state in which it is attacked.

    `x` float32 (B, C, H, W) in [0, 1], on the model's device: two images or more, which a BatchNorm in training mode
    needs. Modes, buffers, gradients and the random state are restored.
    """
    with attacking(model), torch.random.fork_rng([x.device] if x.is_cuda else []), keeping_buffers(model):
        return list(_doubts(model, x.detach()))


def drawn(one: nn.Module, other: nn.Module) -> list[str]:
    """One sentence if the same network, built with two seeds, has random weights; they may be on two devices."""
    state = other.state_dict()
    random = [name for name, tensor in one.state_dict().items() if not torch.equal(tensor.cpu(), state[name].cpu())]
    if not random:
        return []
    return [
        f"{len(random)} of its {len(state)} tensors (the first is {random[0]}) are drawn at random: it is not trained; "
        "ask its target for trained weights (often pretrained=true or weights=...), or use checkpoint=FILE"
    ]


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers afterwards: a BatchNorm in training mode updates its statistics."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def _doubts(model: nn.Module, x: Tensor) -> Iterator[str]:
    kinds = (_NormBase, _DropoutNd)
    training = [name for name, layer in model.named_modules() if layer.training and isinstance(layer, kinds)]
    if training:
        yield (
            f"{len(training)} of its BatchNorm and Dropout layers (the first is {training[0]}) are in training mode "
            "although eval() was called: the evaluated model is not the trained one"
        )
    with torch.no_grad():
        logits, again, half = model(x), model(x), model(x[: -(-len(x) // 2)])
    if not logits.isfinite().all():
        yield "its outputs are not finite; check its weights, and that it takes images in [0, 1]"
        return
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():  # log-probabilities are logits, too
        yield "its outputs are probabilities: the softmax of a softmax hides gradients; return logits"
    if _differ(logits, again, 1e-4):
        yield (
            "two passes over the same images differ, so it is random: attack and evaluation use different draws; "
            "fix them, or use attack.autoattack.version=rand, which averages over draws"
        )
    elif _differ(logits[: len(half)], half, 1e-2):
        yield (
            "its output for an image depends on the other images of the batch, so evaluation.batch_size changes the "
            "result; give BatchNorm its running statistics"
        )
    if doubt := _gradient_doubt(model, x):
        yield f"{doubt}: plain gradient attacks prove nothing; use attack=suite, which adapts to it"


def _gradient_doubt(model: nn.Module, x: Tensor) -> str | None:
    x = x.clone().requires_grad_()
    gradient = None
    try:
        logits = model(x)
        if logits.requires_grad:
            # Any mixture of the logits but sums over classes or images, which some models hold constant.
            mixture = torch.linspace(-1, 1, logits.numel(), device=x.device).view_as(logits)
            (gradient,) = torch.autograd.grad(logits, x, mixture, allow_unused=True)
    except Exception as error:  # other people's backward pass can raise anything
        reason = first_line(error)
        if "deterministic" in reason:  # a matter of the hardware's settings, not of the model
            raise UserError(f"hardware.deterministic=true: {reason}") from error
        return None if is_out_of_memory(error) else f"it cannot be differentiated ({reason})"
    if gradient is None:
        return "its outputs do not depend on the images as far as autograd sees (no_grad, detach or NumPy inside?)"
    if not gradient.isfinite().all():
        return "its gradient is not finite (a root or a logarithm of zero inside?)"
    if not gradient.any() and (logits != logits[:1]).any():  # rightly zero for a last layer initialised to zero
        return f"its gradient is exactly zero on all {len(x)} images (rounding, quantising or saturation inside?)"
    return None


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether outputs differ by more than rounding, which depends on the size of the batch."""
    return bool((one - other).abs().max() > tolerance * one.abs().max())

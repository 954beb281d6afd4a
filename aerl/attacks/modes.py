"""What all attacks need of a model: a fixed state, predictions and input gradients, and a way to report doubts."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from aerl.errors import UserError

NOT_FINITE = "the model returned NaN or infinity: such logits count as misclassified, such gradients are not followed"

_log = logging.getLogger("aerl.attacks")
_collected: ContextVar[list[str] | None] = ContextVar("_collected", default=None)


class NoGradient(UserError):
    """The logits do not depend differentiably on the images: only a black-box attack can evaluate the model."""

    def __init__(self) -> None:
        super().__init__("the model's logits do not depend differentiably on the image; use adaptive, square or noise")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; restore the training flag of each submodule on exit."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training  # module.train(...) would set the submodules, too


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient; restore on exit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 as float32: no autocast, no TF32, no bfloat16 inside matrix products."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


@contextmanager
def attacking(model: nn.Module, *, in_training: bool = False) -> Iterator[None]:
    """The state of every attack: eval mode, frozen parameters, full precision, gradients on; restored on exit.

    `in_training` keeps the caller's precision. Works inside `no_grad`, `inference_mode` and autocast.
    """
    precision = nullcontext() if in_training else full_precision()
    with evaluating(model), frozen(model), precision, torch.inference_mode(False), torch.enable_grad():
        yield


def predictions(logits: Tensor) -> Tensor:
    """The predicted class int64 (B,) of logits (B, K), -1 (not a class) where they are not all finite.

    Raises UserError for another shape or K < 2.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise UserError(f"the model returned shape {tuple(logits.shape)}: expected logits of 2 classes or more")
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)  # argmax of NaN may be the label


def count_classes(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The number of logits for one blank image like those of x (B, C, H, W), which may be empty."""
    with torch.no_grad():
        logits = model(x.new_zeros(1, *x.shape[1:]))
    predictions(logits)  # for its UserError
    return logits.shape[1]


def input_gradient(value: Tensor, point: Tensor, sound: Tensor | None = None) -> Tensor:
    """The gradient of value.sum() with respect to the images `point`; raises NoGradient if there is none.

    Non-finite entries become zero and set `sound`, a bool (), to false.
    """
    if not value.requires_grad:
        raise NoGradient
    (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
    if gradient is None:
        raise NoGradient
    if sound is not None:
        sound &= gradient.isfinite().all()
    return gradient.nan_to_num(0, 0, 0)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that receives what attacks `warn` about inside, each message once."""
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


def warn(message: str) -> None:
    """Report a doubt about an attack's result: to the log, and to the innermost `collect_warnings`, once."""
    messages = _collected.get()
    if messages is None or message not in messages:
        _log.warning(message)
        if messages is not None:
            messages.append(message)

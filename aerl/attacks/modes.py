"""What an attack does to the world around it, undone afterwards: model state, precision, warnings."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from aerl.types import UserError

_log = logging.getLogger("aerl.attacks")


class NoGradient(UserError):
    """The model's logits do not depend differentiably on its images: only a black-box attack can evaluate it."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits do not depend differentiably on the image: no gradient to follow; "
            "square and noise need none"
        )


NOT_FINITE = (
    "the model returned NaN or infinity: images with such logits count as misclassified, and such gradients are "
    "not followed"
)


def predictions(logits: Tensor) -> Tensor:
    """The predicted class int64 (B,) of logits (B, K): -1, which is no class, unless all K logits are finite.

    (The argmax of NaN is the place of the first NaN, which may be the label.) Raises UserError for fewer than
    two logits per image, among which there is no decision.
    """
    check_logits(logits)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def check_logits(logits: Tensor) -> None:
    """Raise UserError unless `logits` are (B, K) with K >= 2."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise UserError(
            f"the model returns outputs of shape {tuple(logits.shape)}: an attack needs logits (images, classes) "
            "of 2 classes or more"
        )


def input_gradient(value: Tensor, point: Tensor, sound: Tensor | None = None) -> Tensor:
    """The gradient of value.sum() with respect to the images `point`; NoGradient if there is none.

    What is not finite in it becomes zero, and then `sound`, a bool (), becomes false.
    """
    if not value.requires_grad:
        raise NoGradient
    (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
    if gradient is None:
        raise NoGradient
    if sound is not None:
        sound &= gradient.isfinite().all()
    return gradient.nan_to_num(0, 0, 0)


def count_classes(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Ask the model with a blank image like those of x (B, C, H, W), so that an empty batch will do."""
    with torch.no_grad():
        logits = model(x.new_zeros(1, *x.shape[1:]))
    check_logits(logits)
    return logits.shape[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; on leaving, give every submodule its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            # Not module.train(training), which would set the submodules as well.
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient; on leaving, restore each parameter's own setting."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 as float32: no autocast, no TF32, no bfloat16 inside matrix products.

    The precision of products lives in two places since torch 2.9: the old switches (`allow_tf32`,
    `set_float32_matmul_precision`) and the new `fp32_precision` strings. Parts of torch refuse to run
    while the two disagree, so both are set, and both restored.
    """
    backends: Any = torch.backends
    owners = [backends.cuda.matmul]
    owners += [getattr(backends.cudnn, name, None) for name in ("conv", "rnn")]
    owners += [getattr(backends.mkldnn, name, None) for name in ("matmul", "conv")]
    modern = [(owner, owner.fp32_precision) for owner in owners if hasattr(owner, "fp32_precision")]
    with ExitStack() as stack, warnings.catch_warnings():
        # torch 2.9 calls the old switches deprecated; they are used only to keep both in step.
        warnings.filterwarnings("ignore", message=".*TF32 behavior.*")
        # torch's defaults where the user has set the new switches to something that the old ones cannot say.
        matmul, cudnn = "highest", True
        with suppress(RuntimeError):
            matmul = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            cudnn = backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
            for owner, _ in modern:
                owner.fp32_precision = "ieee"
            for device in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = cudnn
            for owner, precision in modern:
                owner.fp32_precision = precision


@contextmanager
def attacking(model: nn.Module, *, in_training: bool = False) -> Iterator[None]:
    """The state every attack runs in: eval mode, frozen parameters, full precision, gradients on.

    `in_training` keeps the caller's precision: an adversary in a training step computes as the step does.
    Works inside an outer `no_grad`, `inference_mode` or autocast. All of it is restored on leaving,
    also by an exception.
    """
    with (
        evaluating(model),
        frozen(model),
        nullcontext() if in_training else full_precision(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


_collected: ContextVar[list[str] | None] = ContextVar("_collected", default=None)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that receives the warnings of the attacks inside, each once.

    An attack that suspects its own number (a randomised model, probabilities for logits, ...) calls `warn`.
    Outside this context its message only reaches the logger `aerl.attacks`.
    """
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


def warn(message: str) -> None:
    """Report something about an attack's result: to the log, and to the nearest `collect_warnings`, once."""
    messages = _collected.get()
    if messages is None:
        _log.warning(message)
    elif message not in messages:
        messages.append(message)
        _log.warning(message)

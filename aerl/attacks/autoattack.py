"""The official AutoAttack (Croce & Hein 2020), made safe to call from a longer program."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks.direct import noise_of
from aerl.attacks.modes import NOT_FINITE, attacking, count_classes, input_gradient, warn
from aerl.attacks.random import Seed
from aerl.errors import UserError
from aerl.types import Count, NonNegative, Norm

Component = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

_VERSIONS: dict[str, list[Component]] = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    "rand": ["apgd-ce", "apgd-dlr"],
}


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack as `attack(model, x, y, *, generator)`.

    version: the library's: "standard" (APGD-CE, targeted APGD-DLR, targeted FAB, Square), "plus" (also the untargeted
        ones, with restarts) or "rand" (APGD-CE and APGD-DLR over 20 passes, for randomised models).
    attacks: the components to run, in order, with the version's settings; null means all of the version.
    queries: forward passes that Square may spend on a sample.
    batch_size: samples attacked at a time. A batch shares its random numbers, so the outcome may depend on it.

    Each component attacks what the ones before could not fool. A robust sample comes back as its clean image. A sample
    that APGD fools comes back as its first adversarial image (the library's: the last).

    Few classes: targeted components aim at min(9, K - 1) classes; targeted DLR needs four classes, else plain DLR is
    run, which needs three. Square in L1 and L2 needs images of 5 pixels. Each omission is a warning, as are the
    library's doubts (randomised model, probabilities for logits, zero gradients, ...) and NaN or infinity.
    """

    eps: NonNegative
    norm: Norm = "L2"
    version: Literal["standard", "plus", "rand"] = "standard"
    attacks: list[Component] | None = None
    queries: Count = 5000
    batch_size: Count = 250

    def stages(self, model: nn.Module, x: Tensor) -> list["AutoAttack"]:
        """One AutoAttack for each component that can run on `model` and images like x (B, C, H, W), in order.

        Running each on the survivors of the ones before gives the library's outcomes. x may be empty.
        """
        with attacking(model):
            components = self._components(count_classes(model, x), x)
        return [replace(self, attacks=[component]) for component in components]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Seed = None) -> Tensor:
        """Attack images x (B, C, H, W) in [0, 1] of classes y (B,); `generator` gives only its seed.

        Raises UserError if no component can run (also for an empty batch); NoGradient if a component other than Square
        gets logits that do not depend differentiably on the images.
        """
        from pyautoattack import AutoAttack as Library  # type: ignore[import-untyped]

        generator, logits = noise_of(model, x, y, generator), partial(_logits, model, x, y)
        with attacking(model), _contained():
            classes = count_classes(logits, x)
            components = self._components(classes, x)
            if len(x) == 0 or self.eps == 0:
                return x.clone()
            # AutoAttack computes in float32, and reshapes by .view, which needs contiguous images.
            clean = x.detach().float().contiguous()
            if components != ["square"]:
                probe = clean[:1].clone().requires_grad_()
                input_gradient(logits(probe), probe)  # or NoGradient, where the library would crash
            # A new object for each batch: a run of targeted FAB changes the restarts of FAB for good.
            library = Library(
                logits, device=x.device, eps=self.eps, norm=self.norm, seed=generator.seed, version=self.version
            )
            library.attacks_to_run = components
            library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, classes - 1)
            library.square.n_queries = self.queries
            eta = library.square.eta
            library.square.eta = lambda side: eta(side).as_subclass(_Tile)
            # "rand" averages over several passes: a single one decides nothing. In L1 APGD begins in larger balls.
            if self.version != "rand" and self.norm != "L1":
                _drop_fooled(library.apgd, classes)
                _drop_fooled(library.apgd_targeted, classes)
            found, _ = library.run_standard_evaluation(clean, y, batch_size=self.batch_size)
        return torch.empty_like(x).copy_(found)

    def _components(self, classes: int, x: Tensor) -> list[Component]:
        """The components that can attack a model of so many classes and images like x (B, C, H, W)."""
        height, width = x.shape[2:]
        wanted = _VERSIONS[self.version] if self.attacks is None else self.attacks
        able: list[Component] = ["apgd-dlr" if name == "apgd-t" and classes < 4 else name for name in wanted]
        able = [
            name
            for name in dict.fromkeys(able)
            if not (name == "apgd-dlr" and classes < 3)
            and not (name == "square" and self.norm != "Linf" and min(height, width) < 5)
        ]
        limits = f"{classes} classes and {height}x{width} pixels"
        if not able:
            raise UserError(f"attacks=[{','.join(wanted)}]: none of them can attack {limits}")
        if able != wanted:
            warn(f"AutoAttack: ran {', '.join(able)} instead of {', '.join(wanted)}, given {limits}")
        return able


def _logits(model: nn.Module, x: Tensor, y: Tensor, images: Tensor) -> Tensor:
    """The model's logits of `images` near x (B, C, H, W) of classes y, in float32, finite, with finite gradients.

    The library takes NaN for a right answer. Non-finite logits become those of a wrong one: of another class than
    the nearest clean image.
    """
    if images.requires_grad:
        images = images.view_as(images)
        images.register_hook(_finite)  # type: ignore[no-untyped-call]
    output: Tensor = model(images.to(x.dtype)).to(torch.float32, copy=True)  # Square writes into it
    finite = output.detach().isfinite().all(1)
    if finite.all():
        return output
    warn(NOT_FINITE)
    nearest = torch.cdist(images.detach().flatten(1), x.to(images).flatten(1)).argmin(1)
    wrong = F.one_hot((y[nearest] + 1) % output.shape[1], output.shape[1]).to(output)
    return torch.where(finite[:, None], output, wrong)


def _finite(gradient: Tensor) -> Tensor:
    if not gradient.isfinite().all():
        warn(NOT_FINITE)
    return gradient.nan_to_num(0, 0, 0)


class _Tile(Tensor):
    """A tile of Square's first perturbation in L1 and L2, cut at the border of the image.

    The library adds h // s tiles of side s = h // 5 in both directions, from pixel (h - 5 s) // 2 on. At some image
    sizes the last ones do not fit, and torch raises.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("add_", "__iadd__"):
            place, tile = args
            args = (place, tile[..., : place.shape[-2], : place.shape[-1]])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _drop_fooled(apgd: Any, classes: int) -> None:
    """Make the library's `apgd` query the model only about samples that it has not fooled yet in the same run.

    For a fooled sample it gets constant logits of the right answer, so it keeps the image that fooled the model.
    """
    query, run = apgd.model, apgd.attack_single_run

    def attack_single_run(x: Tensor, y: Tensor, x_init: Tensor | None = None) -> tuple[Tensor, ...]:
        resists = torch.ones_like(y, dtype=torch.bool)
        right = F.one_hot(y, classes).float()

        def model(images: Tensor) -> Tensor:
            logits = right + 0 * images.flatten(1)[:, :1]  # so that there is a gradient: zero
            rows = resists.nonzero().flatten()
            if len(rows):
                logits = logits.index_put((rows,), query(images[rows]))
            resists.logical_and_(logits.detach().argmax(1) == y)
            return logits

        apgd.model = model
        found: tuple[Tensor, ...] = run(x, y, x_init)
        apgd.model = query
        return found

    apgd.attack_single_run = attack_single_run


@contextmanager
def _contained() -> Iterator[None]:
    """Undo what the library does to the process.

    It seeds torch's global generators, removes the trace function of coverage and debuggers, logs, and counts
    over all its objects whether a model used gradients in its forward pass.
    """
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    level, tracer = logger.level, sys.gettrace()
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addFilter(_as_warning)
    logger.setLevel(logging.WARNING)
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda._initialized else []):
            yield
    finally:
        sys.settrace(tracer)
        logger.removeFilter(_as_warning)
        logger.setLevel(level)


def _as_warning(record: logging.LogRecord) -> bool:
    """A filter that turns the library's messages into warnings, without the counts that differ in every batch."""
    message = re.sub(r" See \S+ for details\.| of -?[\d.]+%|(?<=there are )\d+ ", "", record.getMessage())
    if "not possible to use" not in message:  # targeted DLR for three classes, which is not run
        warn(f"AutoAttack: {message.strip()}")
    return False

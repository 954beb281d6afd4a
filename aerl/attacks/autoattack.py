"""The official AutoAttack (Croce & Hein 2020), made safe to call from a longer program."""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks.modes import NOT_FINITE, attacking, count_classes, input_gradient, warn
from aerl.attacks.projections import norms
from aerl.attacks.random import Noise
from aerl.types import Count, NonNegative, Norm, UserError

Component = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

_VERSIONS: dict[str, list[Component]] = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    "rand": ["apgd-ce", "apgd-dlr"],
}
_TOLERANCE = 1e-6  # float32 rounding of image + perturbation, in units of the image's range


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack as `attack(model, x, y, *, generator)`.

    version: which components run, with which of the library's settings: "standard" (APGD-CE, targeted
        APGD-DLR, targeted FAB, Square), "plus" (also the untargeted ones, with restarts), "rand" (APGD-CE
        and APGD-DLR averaged over 20 passes, for randomised models), or "custom": the library's defaults
        (five restarts of APGD and FAB) for the components in `attacks`.
    attacks: the components to run, in order; null means those of the version.
    queries: forward passes that Square may spend on a sample.
    batch_size: samples attacked at a time. A batch shares its random numbers, so the outcome may depend on this
        and on the order of the samples.

    Each component works on what the ones before have left. A robust sample comes back as its clean image, so this
    is no source of transfer attacks; a sample that APGD fools comes back as its first adversarial image, where the
    library returns the last.

    Few classes: targeted components aim at min(9, K - 1) classes. Targeted DLR needs four classes and is
    replaced by plain DLR for three; DLR needs three and is left out for two. Square in L2 needs images of
    5 pixels. Each omission is a warning, as are AutoAttack's own doubts (randomised model, probabilities for
    logits, zero gradients, ...), logits that are not finite, which count as misclassified, and gradients that are
    not finite, which are not followed.
    """

    eps: NonNegative
    norm: Norm = "L2"
    version: Literal["standard", "plus", "rand", "custom"] = "standard"
    attacks: list[Component] | None = None
    queries: Count = 5000
    batch_size: Count = 250

    def __post_init__(self) -> None:
        known = ", ".join(get_args(Component))
        if self.attacks == [] or (self.version == "custom" and self.attacks is None):
            raise UserError(f"attacks={self.attacks} with version={self.version}: name one or more of {known}")
        for name in self.attacks or []:
            if name not in get_args(Component):
                raise UserError(f"attacks={self.attacks}: {name!r} is none of {known}")

    def stages(self, model: nn.Module, x: Tensor) -> list["AutoAttack"]:
        """One AutoAttack for each component that can run on `model` and images like x (B, C, H, W), in order.

        Running each over the test set, in batches of `batch_size` of the samples that the ones before have
        left, is what the library does: the outcomes are the same. x may be empty. Raises UserError if no component
        can run.
        """
        with attacking(model):
            components = self._components(count_classes(model, x), x)
        return [replace(self, attacks=[component]) for component in components]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise) -> Tensor:
        """Attack images x (B, C, H, W) in [0, 1] of classes y (B,); `generator` gives only its seed.

        Raises UserError if no component can run on so few classes, also for an empty batch; NoGradient if a
        component other than Square gets logits that do not depend differentiably on the images.
        """
        logits = partial(_logits, model, x, y)
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
            library = self._library(logits, classes, generator.seed, x.device)
            library.attacks_to_run = components
            found, _ = library.run_standard_evaluation(clean, y, batch_size=self.batch_size)
            return self._valid(found, x)

    def _library(self, logits: Callable[[Tensor], Tensor], classes: int, seed: int, device: torch.device) -> Any:
        """A new object for each batch: a run of targeted FAB changes the restarts of FAB for good."""
        from pyautoattack import AutoAttack as Library  # type: ignore[import-untyped]

        library = Library(logits, device=device, eps=self.eps, norm=self.norm, seed=seed, version=self.version)
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, classes - 1)
        library.square.n_queries = self.queries
        eta = library.square.eta
        library.square.eta = lambda side: eta(side).as_subclass(_Tile)
        if self.version != "rand":  # which averages over several passes, none of which decides alone
            _drop_fooled(library.apgd, classes)
            _drop_fooled(library.apgd_targeted, classes)
        return library

    def _components(self, classes: int, x: Tensor) -> list[Component]:
        """What to run on a model of so many classes and on images like x (B, C, H, W)."""
        size = x.shape[2:]
        wanted = list(self.attacks or _VERSIONS[self.version])
        able: list[Component] = ["apgd-dlr" if name == "apgd-t" and classes < 4 else name for name in wanted]
        if classes < 3:
            able = [name for name in able if name != "apgd-dlr"]
        if self.norm == "L2" and min(size) < 5:
            able = [name for name in able if name != "square"]
        able = list(dict.fromkeys(able))
        limits = f"{classes} classes and {size[0]}x{size[1]} pixels"
        if not able:
            raise UserError(f"attacks={', '.join(wanted)}: none of them can attack {limits}")
        if able != wanted:
            warn(f"AutoAttack: ran {', '.join(able)} instead of {', '.join(wanted)}, given {limits}")
        return able

    def _valid(self, found: Tensor, x: Tensor) -> Tensor:
        """What the library found, in the layout of x; where that is outside the threat model, x."""
        found = torch.empty_like(x).copy_(found)
        size = norms(found - x, self.norm).flatten()
        low, high = found.amin((1, 2, 3)), found.amax((1, 2, 3))
        # Written so that NaN is invalid.
        valid = (size <= self.eps + _TOLERANCE) & (low >= -_TOLERANCE) & (high <= 1 + _TOLERANCE)
        if not valid.all():
            warn("AutoAttack: it returned images outside the ball or the box; they count as not found")
        return torch.where(valid[:, None, None, None], found, x)


def _logits(model: nn.Module, x: Tensor, y: Tensor, images: Tensor) -> Tensor:
    """The model's logits as the library takes them: of float32 images near x (B, C, H, W), of classes y, finite.

    The library takes NaN for a right answer. Where a logit is not finite it gets a wrong one instead: for the label
    of the nearest clean image.
    """
    if images.requires_grad:
        images = images.view_as(images)
        images.register_hook(_finite)  # type: ignore[no-untyped-call]
    output: Tensor = model(images.to(x.dtype)).to(torch.float32, copy=True)  # Square writes into what it gets
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
    """A tile of Square's first perturbation in L2, cut off at the border of the image.

    The library adds h // s tiles of side s = h // 5, from pixel (h - 5 s) // 2 on, in both directions. At some image
    sizes the last ones do not fit, and torch refuses.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("add_", "__iadd__"):
            place, tile = args
            args = (place, tile[..., : place.shape[-2], : place.shape[-1]])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _drop_fooled(apgd: Any, classes: int) -> None:
    """Make the library's `apgd` query the model only about samples that it has not fooled yet in the same run.

    It still steps all of its samples, each by its own gradient. For a fooled one it gets the logits of a right
    answer that depends on nothing, so that it keeps the image that fooled the model.
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
        try:
            found: tuple[Tensor, ...] = run(x, y, x_init)
        finally:
            apgd.model = query
        return found

    apgd.attack_single_run = attack_single_run


@contextmanager
def _contained() -> Iterator[None]:
    """Undo what the library does to the process: random state, trace function, log messages.

    It seeds torch's global generators, removes the trace function of coverage and debuggers, and counts
    in a module's variable, over all its objects, whether a model ever used gradients in its forward.
    """
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    level, tracer = logger.level, sys.gettrace()
    cuda = [torch.cuda.current_device()] if torch.cuda._initialized else []
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addFilter(_as_warning)
    logger.setLevel(logging.WARNING)
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        sys.settrace(tracer)
        logger.removeFilter(_as_warning)
        logger.setLevel(level)


def _as_warning(record: logging.LogRecord) -> bool:
    """A filter that turns the library's messages into warnings, without the counts that differ in every batch."""
    message = re.sub(r" See \S+ for details\.| of -?[\d.]+%|(?<=there are )\d+ ", "", record.getMessage())
    if "not possible to use" not in message:  # with three classes targeted DLR, which we do not run
        warn(f"AutoAttack: {message.strip()}")
    return False

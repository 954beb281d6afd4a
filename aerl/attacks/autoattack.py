"""The official AutoAttack (Croce & Hein 2020), made safe to call from a longer program."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from aerl.attacks.modes import attacking, warn
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
    """AutoAttack as `attack(model, x, y, *, generator)`; its settings are checked when it is made.

    version: "standard" (APGD-CE, targeted APGD-DLR, targeted FAB, Square), "plus" (also the untargeted
        ones, with restarts), "rand" (APGD averaged over 20 passes, for randomised models), or "custom":
        the library's defaults (five restarts of APGD and FAB) for the components in `attacks`.
    attacks: the components of version "custom", in order; null otherwise.
    individual: run every component on every sample from its clean image and return a dict from component
        to images. Otherwise each works on what the ones before have left, and one tensor comes back, in
        which a robust sample is its clean image: no source of transfer attacks.
    batch_size: samples attacked at a time. A batch shares its random numbers, so that, unlike PGD's, the
        outcome may depend on this and on the order of the samples.

    Few classes: targeted components aim at min(9, K - 1) classes. Targeted DLR needs four classes and is
    replaced by plain DLR for three; DLR needs three and is left out for two. Square in L2 needs images of
    5 pixels. Each omission is told through `aerl.attacks.warn`, as are AutoAttack's own doubts (randomised
    model, probabilities for logits, zero gradients, ...).
    """

    eps: NonNegative
    norm: Norm = "L2"
    version: Literal["standard", "plus", "rand", "custom"] = "standard"
    attacks: list[Component] | None = None
    individual: bool = False
    batch_size: Count = 250

    def __post_init__(self) -> None:
        known = ", ".join(get_args(Component))
        if self.version != "custom" and self.attacks is not None:
            raise UserError(f"attacks={self.attacks} with version={self.version}: needs version=custom")
        if self.version == "custom" and not self.attacks:
            raise UserError(f"attacks={self.attacks} with version=custom: name one or more of {known}")
        for name in self.attacks or []:
            if name not in get_args(Component):
                raise UserError(f"attacks={self.attacks}: {name!r} is none of {known}")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise
    ) -> Tensor | dict[str, Tensor]:
        """Attack images x (B, C, H, W) in [0, 1] of classes y (B,); `generator` gives only its seed.

        Raises UserError, also for an empty batch, if no component can run on so few classes, and for
        logits that are not finite.
        """

        def logits(images: Tensor) -> Tensor:
            # A copy, since Square writes into what it gets.
            output: Tensor = model(images.to(x.dtype)).to(torch.float32, copy=True)
            if not output.isfinite().all():
                raise UserError("the model returned NaN or infinite logits: no attack can judge it")
            return output

        with attacking(model), _contained():
            # AutoAttack computes in float32, and reshapes by .view, which needs contiguous images.
            clean = x.detach().float().contiguous()
            with torch.no_grad():  # on a blank image, so that an empty batch checks the settings as well
                classes = logits(clean.new_zeros(1, *clean.shape[1:])).shape[1]

            def run(components: list[Component]) -> Tensor:
                from pyautoattack import AutoAttack as Library  # type: ignore[import-untyped]

                if len(x) == 0 or self.eps == 0:
                    return x.clone()
                # A new object each time: a run of targeted FAB changes the restarts of FAB for good.
                library = Library(
                    logits,
                    attacks=self.attacks,
                    device=x.device,
                    eps=self.eps,
                    norm=self.norm,
                    seed=generator.seed,
                    version=self.version,
                )
                library.attacks_to_run = components
                library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, classes - 1)
                found, _ = library.run_standard_evaluation(clean, y, batch_size=self.batch_size)
                return self._valid(found, x)

            components = self._components(classes, (x.shape[2], x.shape[3]))
            if self.individual:
                return {component: run([component]) for component in components}
            return run(components)

    def _components(self, classes: int, size: tuple[int, int]) -> list[Component]:
        """What to run on a model of so many classes and images of such (height, width)."""
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


@contextmanager
def _contained() -> Iterator[None]:
    """Undo what the library does to the process: random state, trace function, log messages.

    It seeds torch's global generators, removes the trace function of coverage and debuggers, and counts
    in a module's variable, over all its objects, whether a model ever used gradients in its forward.
    """
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    level, propagate, tracer = logger.level, logger.propagate, sys.gettrace()
    collector = _Collector()
    cuda = [torch.cuda.current_device()] if torch.cuda._initialized else []
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        sys.settrace(tracer)
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate
        for message in collector.messages:
            warn(message)


class _Collector(logging.Handler):
    """Keeps the library's warnings, each once, without the counts that would make every batch's differ."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Note a warning. The one about DLR with three classes means targeted DLR, which we do not run."""
        message = re.sub(r" See \S+ for details\.| of -?[\d.]+%|(?<=there are )\d+ ", "", record.getMessage())
        if "not possible to use" not in message:
            self.messages["AutoAttack: " + message.strip()] = None

"""Projected gradient descent, and its one-step form FGSM."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerl.attacks import losses
from aerl.attacks.direct import noise_of
from aerl.attacks.modes import NOT_FINITE, attacking, count_classes, input_gradient, predictions, warn
from aerl.attacks.projections import ascent_direction, clip, free, random_extreme, random_in_ball
from aerl.attacks.random import Noise, Seed
from aerl.attacks.straight_through import before_softmax, straight_through
from aerl.errors import UserError
from aerl.types import Count, NonNegative, Norm


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: Seed = None,
    norm: Norm = "L2",
    eps: NonNegative,
    steps: Count = 100,
    step_size: NonNegative | None = None,
    restarts: Count = 1,
    random_start: bool = True,
    loss: Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr", "kl"] = "log_odds",
    targeted: bool = False,
    drop_fooled: bool = True,
    keep: Literal["worst", "last"] = "worst",
    eot: Count = 1,
    gradient: Literal["backprop", "straight_through", "finite_differences"] = "backprop",
    jitter: NonNegative = 0,
    directions: Count = 50,
    in_training: bool = False,
    start: Tensor | None = None,
    observe: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], object] | None = None,
    direction: Callable[[Tensor, Norm], Tensor] = ascent_direction,
) -> Tensor:
    """PGD (Madry et al. 2018, section 2.1): maximise a loss in steps of fixed length, within the ball.

    `model` maps images (B, C, H, W) in [0, 1] to logits (B, K); `y` (B,) holds the true classes. Returns images like
    `x`, each within `eps` of it in `norm` and within [0, 1]. Lengths are in units of the images' range.

    generator: of the random starts: a seed (None is 0), which gives each image its own stream, or a torch.Generator.
    step_size: length of a step; None means eps / 10.
    restarts: runs from new starting points, each for the samples that are not fooled yet.
    random_start: start uniformly in the ball, not at x. One step from x is FGSM (Goodfellow et al. 2015, section 4).
    loss: a function of `aerl.attacks.losses`. `kl` ignores `y` and needs a random start.
    targeted: MultiTargeted (Gowal et al. 2019, section 3): restart r aims at the r-th most likely wrong class of the
        clean image, and any misclassification counts. `margin` gives the paper's surrogate z_target - z_y.
    drop_fooled: a sample leaves the batch at its first misclassified iterate (unperturbed if it is misclassified
        clean). Cheaper, and the same samples are fooled.
    keep: "worst" returns the iterate of the highest loss, where misclassified ones rank above all others; "last"
        returns the last iterate.
    eot: forward passes to average per step (expectation over transformation, Athalye et al. 2018, section 4.2). A
        sample is misclassified if the mean of their softmax is.
    gradient: "straight_through" repairs operations that have none, and takes off a softmax in which the model ends; see
        `aerl.attacks.straight_through`. "finite_differences" needs only values: random `directions`, each times the
        difference of the loss at the points eps / 4 ahead and behind (NES, Ilyas et al. 2018, section 2.1).
    jitter: each of the `eot` gradients is taken at a random point of the ball of radius jitter * eps around the
        iterate: the gradient of a smoothed loss, for gradients that are shattered.
    in_training: for a training step: keeps the caller's precision, and skips the checks that wait for the device.
    start: images like x, projected into ball and box, from which the first restart starts.
    observe: called at every iterate with the step, the rows of x (b,) under attack, the iterate (b, C, H, W), its
        logits (b, K) and the gradient (b, C, H, W) of the loss, None at the last iterate.
    direction: the step of unit length along a gradient.

    Images with non-finite logits are misclassified, and non-finite gradients are not followed: both are warnings.
    Raises UserError for settings that do not fit together or the number of classes (also for an empty batch) and for
    images outside [0, 1]; NoGradient for logits that do not depend on the images.
    """
    generator = noise_of(model, x, y, generator)
    if restarts > 1 and not (random_start or targeted):
        raise UserError(f"restarts={restarts}: all would be equal; set random_start=true or targeted=true")
    if loss == "kl" and (targeted or not random_start):
        raise UserError("loss=kl: needs random_start=true and targeted=false (its gradient is zero at the clean image)")
    if targeted or loss == "dlr":
        with attacking(model):
            classes = count_classes(model, x)
        if loss == "dlr" and classes < 3:
            raise UserError(f"loss=dlr: needs 3 classes or more, the model has {classes}; use margin")
        if targeted and restarts > classes - 1:
            warn(f"restarts={restarts}: reduced to {classes - 1}, the number of wrong classes")
            restarts = classes - 1
    if len(x) == 0 or eps == 0:
        return x.clone()
    low, high = x.aminmax()
    if not in_training and not (low >= 0 and high <= 1):
        raise UserError(f"images from {low:.3g} to {high:.3g}: must be in [0, 1]; normalise in the model")
    step_size = eps / 10 if step_size is None else step_size

    def objective(point: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
        with straight_through() if gradient == "straight_through" and point.requires_grad else nullcontext():
            logits = before_softmax(model(point)).to(x.dtype)
            value = getattr(losses, loss)(logits, aim)
        return logits, -value if targeted else value

    def slope(point: Tensor, aim: Tensor, noise: Noise) -> Tensor:
        """The gradient of the loss near the iterate, or by finite differences around it."""
        if jitter:
            point = (point + random_in_ball(point, norm, jitter * eps, noise)).clamp_(0, 1)
        if gradient != "finite_differences":
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                return input_gradient(objective(point, aim)[1], point, sound)
        total = torch.zeros_like(point)
        with torch.no_grad():
            for _ in range(directions):
                step = random_extreme(point, norm, eps / 4, noise)
                ahead, behind = (objective((point + side).clamp_(0, 1), aim)[1] for side in (step, -step))
                total += step * (ahead - behind).nan_to_num(0, 0, 0)[:, None, None, None]
        return total

    def evaluate(point: Tensor, aim: Tensor, index: Tensor, climbing: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, loss and, if climbing, its gradient. Of several passes loss and gradient are sums, which will do."""
        passes, values, gradients = [], [], []
        at_point = not jitter and gradient != "finite_differences"  # one pass gives both
        with torch.set_grad_enabled(climbing and at_point):
            for _ in range(eot):
                logits, value = objective(point, aim)
                if climbing:
                    gradients.append(
                        input_gradient(value, point, sound) if at_point else slope(point, aim, generator[index])
                    )
                passes.append(logits.detach())
                values.append(value.detach())
        return _mean_prediction(passes), reduce(torch.add, values), reduce(torch.add, gradients) if climbing else None

    with attacking(model, in_training=in_training), torch.no_grad():
        sound = torch.ones((), dtype=torch.bool, device=x.device)
        found, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        highest = torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)
        aims = y[:, None].expand(-1, restarts)
        if targeted or loss == "kl" or (drop_fooled and (random_start or start is not None)):
            clean = _mean_prediction([model(x) for _ in range(eot)])
            predicted = predictions(clean)
            sound &= (predicted >= 0).all()
            fooled = (predicted != y) & drop_fooled
            if targeted:
                aims = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
            elif loss == "kl":
                aims = clean[:, None].expand(-1, restarts, -1)

        for restart in range(restarts):
            # The last iterate needs a forward pass, without a gradient, only if something depends on its prediction.
            classify_last = keep == "worst" or drop_fooled or restart < restarts - 1
            # The samples under attack; origin, aim and point have one row for each.
            index = (~fooled).nonzero().squeeze(1) if drop_fooled or restart else torch.arange(len(x), device=x.device)
            origin, aim = x[index], aims[index, restart]
            if start is not None and restart == 0:
                point = clip(origin, start[index].to(origin) - origin, norm, eps)
            elif random_start:
                point = clip(origin, random_in_ball(origin, norm, eps, generator[index]), norm, eps)
            else:
                point = origin
            for step in range(steps + classify_last):
                if len(index) == 0:
                    break
                climbing = step < steps
                point = point.detach().requires_grad_(climbing)
                logits, value, ascent = evaluate(point, aim, index, climbing)
                predicted = predictions(logits)
                sound &= (predicted >= 0).all()
                wrong = predicted != y[index]
                if observe is not None:
                    observe(step, index, point.detach(), logits, ascent)
                if keep == "worst":
                    better = torch.where(wrong == fooled[index], value > highest[index], wrong)
                    found[index] = torch.where(better[:, None, None, None], point, found[index])
                    highest[index] = torch.where(better, value, highest[index])
                    fooled[index] |= wrong
                else:
                    found[index], fooled[index] = point, wrong
                if ascent is not None:
                    if norm == "L1":  # few pixels move: not those that cannot
                        ascent = free(ascent, point)
                    delta = (point - origin).add_(direction(ascent, norm), alpha=step_size)
                    point = clip(origin, delta, norm, eps)
                # Counting the samples that stay is the step's one wait for the device.
                if drop_fooled and len(stay := (~wrong).nonzero().squeeze(1)) < len(index):
                    index, origin, aim, point = (t[stay] for t in (index, origin, aim, point))
            if not classify_last:
                found[index] = point

        if not in_training and not sound:
            warn(NOT_FINITE)
    return found


def _mean_prediction(passes: list[Tensor]) -> Tensor:
    """Logits (B, K) whose softmax is the mean of that of the passes."""
    if len(passes) == 1:
        return passes[0]
    return torch.stack([logits.log_softmax(1) for logits in passes]).logsumexp(0)


class PGD(partial[Tensor]):
    """`pgd` with its settings, as an object: `PGD(eps=0.5)(model, x, y)`. TypeError for an unknown setting."""

    def __new__(cls, **settings: Any) -> "PGD":
        signature(pgd).bind_partial(**settings)
        return super().__new__(cls, pgd, **settings)

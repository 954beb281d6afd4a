"""Projected gradient descent, and its one-step form FGSM."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from aerl.attacks import losses
from aerl.attacks.modes import NOT_FINITE, attacking, count_classes, input_gradient, predictions, warn
from aerl.attacks.projections import ascent_direction, clip, random_in_ball
from aerl.attacks.random import Noise
from aerl.types import Count, NonNegative, Norm, UserError


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: Noise,
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
    in_training: bool = False,
    start: Tensor | None = None,
    observe: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], object] | None = None,
    direction: Callable[[Tensor, Norm], Tensor] = ascent_direction,
) -> Tensor:
    """PGD (Madry et al. 2018, section 2.1): climb a loss in steps of fixed length, staying in the ball.

    `model` maps images (B, C, H, W) in [0, 1] to logits (B, K); `y` (B,) holds the true classes. Returns
    images like `x`, each within `eps` of it in `norm` and within [0, 1]. All lengths are in units of the
    images' range. `generator` decides the starting points, sample by sample.

    step_size: length of a step; None means eps / 10.
    restarts: runs from new starting points, each with the samples that are not fooled yet.
    random_start: start uniformly in the ball, not at x. One step from x is FGSM (Goodfellow et al. 2015,
        section 4).
    loss: a function of `aerl.attacks.losses`. `log_odds` climbs in cross-entropy's own direction, but
        does not stall on a saturated softmax as `ce` itself does. `kl` ignores `y` and needs a random start.
    targeted: MultiTargeted (Gowal et al. 2019, section 3): restart r aims at the r-th most likely wrong
        class of the clean image, and any misclassification counts. With `loss="margin"` the surrogate is
        the paper's, z_target - z_y. With fewer wrong classes than restarts, each is the target once: a warning.
    drop_fooled: a sample leaves at its first misclassified iterate, or unperturbed if it is wrong to
        begin with, and the batch goes on without it: cheaper, and the same samples are fooled.
    keep: "worst" returns the iterate of the highest loss, where any misclassified one beats all others;
        "last" returns the last iterate.
    eot: forward passes per step, for randomised models. Loss and gradient are averaged over them (expectation
        over transformation, Athalye et al. 2018, section 4.2), and a sample is misclassified if the mean of
        their softmax is.
    in_training: for a training step, which must not wait for the device, and keeps its precision (autocast, TF32):
        neither the range of the images is checked, nor is anything reported that is not finite. With `drop_fooled`
        it still waits. Set by aerl.
    start: images like x, projected into ball and box, from which the first run starts. For callers in Python.
    observe: called at every iterate with the number of the step, the rows of x (b,) that are under attack, the
        iterate (b, C, H, W), its logits (b, K) and the gradient (b, C, H, W) that the next step follows, None at the
        last iterate. For callers in Python.
    direction: the step of unit length along a gradient. For callers in Python.

    An image whose logits are not finite is misclassified; what is not finite in a gradient is not followed. Both
    are warnings. Raises UserError for settings that do not go together or with the number of classes, also for
    an empty batch; for images outside [0, 1]; NoGradient for logits that do not depend on the images.
    """
    if restarts > 1 and not (random_start or targeted):
        raise UserError(f"restarts={restarts}: repeats one run; set random_start=true or targeted=true")
    if loss == "kl" and (targeted or not random_start):
        raise UserError(f"loss=kl: its gradient is zero at the clean image; it needs random_start=true "
                        f"(is {random_start}) and targeted=false (is {targeted})".lower())  # fmt: skip
    if targeted or loss == "dlr":
        with attacking(model):
            classes = count_classes(model, x)
        if loss == "dlr" and classes < 3:
            raise UserError(f"loss=dlr: needs 3 classes or more, the model has {classes}; use margin")
        if targeted and restarts > classes - 1:
            warn(f"restarts={restarts}: aimed at all {classes - 1} wrong classes, since there are no more")
            restarts = classes - 1
    if len(x) == 0 or eps == 0:
        return x.clone()
    if not in_training:
        low, high = (bound.item() for bound in x.aminmax())
        if not (low >= 0 and high <= 1):
            raise UserError(f"images from {low:.3g} to {high:.3g}: must be in [0, 1] and normalised in the model")
    if start is not None and start.shape != x.shape:
        raise UserError(f"start={tuple(start.shape)}: must have the images' shape {tuple(x.shape)}")
    length = eps / 10 if step_size is None else step_size
    objective = getattr(losses, loss)

    def look(point: Tensor, aim: Tensor, climbing: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass: logits, loss and, if climbing, the loss's gradient."""
        with torch.set_grad_enabled(climbing):
            logits = model(point).to(x.dtype)
            value = -objective(logits, aim) if targeted else objective(logits, aim)
            return logits, value, input_gradient(value, point, sound) if climbing else point

    with attacking(model, in_training=in_training), torch.no_grad():
        kept, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        highest = torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)
        sound = torch.ones((), dtype=torch.bool, device=x.device)
        targets = y[:, None].expand(-1, restarts)
        if targeted or loss == "kl" or (drop_fooled and (random_start or start is not None)):
            clean = _mean_prediction([model(x) for _ in range(eot)])
            predicted = predictions(clean)
            sound &= (predicted >= 0).all()
            fooled = (predicted != y) & drop_fooled
            if targeted:
                others = clean.scatter(1, y[:, None], -torch.inf)
                targets = others.argsort(dim=1, descending=True, stable=True)
            elif loss == "kl":
                targets = clean[:, None].expand(-1, restarts, -1)

        for restart in range(restarts):
            # The samples under attack; all tensors of the loop below have one row for each of them.
            everyone = restart == 0 and not drop_fooled
            index = torch.arange(len(x), device=x.device) if everyone else (~fooled).nonzero().squeeze(1)
            if len(index) == 0:
                break
            origin, label, aim = x[index], y[index], targets[index, restart]
            best, best_loss, hit = kept[index], highest[index], fooled[index]
            point = origin
            if start is not None and restart == 0:
                point = clip(origin, start[index].to(origin) - origin, norm, eps)
            elif random_start:
                point = clip(origin, random_in_ball(origin, norm, eps, generator[index]), norm, eps)

            # One forward judges an iterate and gives its gradient. The last iterate is only judged, or, where
            # nothing depends on the verdict, not even that: a training step cannot afford another forward.
            judged = keep == "worst" or drop_fooled or restart < restarts - 1
            for step in range(steps + judged):
                climbing = step < steps
                point = point.detach().requires_grad_(climbing)
                logits, value, gradient = look(point, aim, climbing)
                if eot > 1:
                    passes = [logits]
                    for _ in range(eot - 1):
                        logits, another, more = look(point, aim, climbing)
                        # Sums will do: only the order of losses and the direction of gradients matter.
                        passes, value, gradient = [*passes, logits], value + another, gradient + more
                    logits = _mean_prediction(passes)
                predicted = predictions(logits)
                sound &= (predicted >= 0).all()
                wrong = predicted != label

                if observe is not None:
                    observe(step, index, point.detach(), logits, gradient if climbing else None)
                if keep == "last":
                    best, hit = point, wrong
                else:
                    better = torch.where(wrong == hit, value > best_loss, wrong)
                    best = torch.where(better[:, None, None, None], point, best)
                    best_loss = torch.where(better, value, best_loss)
                    hit = hit | wrong
                # Counting who stays is the step's one wait for the device.
                if drop_fooled and len(stay := (~wrong).nonzero().squeeze(1)) < len(index):
                    kept[index], highest[index], fooled[index] = best, best_loss, hit
                    if len(stay) == 0:
                        break
                    rows = (index, origin, label, aim, best, best_loss, hit, point, gradient)
                    index, origin, label, aim, best, best_loss, hit, point, gradient = (t[stay] for t in rows)
                if climbing:
                    delta = (point - origin).add_(direction(gradient, norm), alpha=length)
                    point = clip(origin, delta, norm, eps)
            kept[index], highest[index], fooled[index] = best if judged else point, best_loss, hit

        if not in_training and not sound:
            warn(NOT_FINITE)
    return kept


def _mean_prediction(passes: list[Tensor]) -> Tensor:
    """The logits (B, K) of one pass; of several, logits whose softmax is the mean of theirs."""
    if len(passes) == 1:
        return passes[0]
    return torch.stack([logits.log_softmax(1) for logits in passes]).logsumexp(0)

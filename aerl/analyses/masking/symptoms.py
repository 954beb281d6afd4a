"""Symptoms: properties of the model, or of the path of plain PGD, that can mask gradients; and the paper's formula.

Each check is a function of the audit.
"""

import itertools

import torch
from torch import Tensor

from aerl.analyses.masking.audit import Audit, Finding, NotMeasured, cosine, is_zero
from aerl.attacks import losses
from aerl.attacks.projections import ascent_direction, clip, norms, random_in_ball
from aerl.evaluation.metrics import probability
from aerl.evaluation.statistics import mcnemar
from aerl.types import Norm

_FEW = 5  # failed samples, below which nothing is said about their paths
# The paper's attack steps along g / sqrt(max(1e-12, |g|^2)), with g the gradient of the mean over a batch.
_PAPER_FLOOR, _PAPER_BATCH = 1e-6, 256

# --- the model ---------------------------------------------------------------------------------------------


def deterministic(audit: Audit) -> Finding:
    return audit.share(audit.randomised, "two passes give different logits")


def probabilities(audit: Audit) -> Finding:
    sums, low = audit.logits.sum(1), audit.logits.amin(1)
    return audit.share(((sums - 1).abs() < 1e-3) & (low >= 0), "the outputs are probabilities, not logits,")


def saturated(audit: Audit) -> Finding:
    """At the end of plain PGD. A confident network is saturated at the image, which is harmless if PGD escapes."""
    certain = int((probability(audit.logits, audit.y) == 1).sum())
    text = f"the probability of the true class is exactly 1 in float32 on {certain} of {audit.n} samples, and after "
    return audit.share(audit.plain.loss[:, -1] == 0, f"{text}plain PGD still")


# --- its gradients -----------------------------------------------------------------------------------------


def zero_ce_gradient(audit: Audit) -> Finding:
    mask = is_zero(audit.ce_gradient) & ~is_zero(audit.margin_gradient)
    return audit.share(mask, "the gradient of the cross-entropy is exactly zero, that of the margin is not,")


def zero_gradient(audit: Audit) -> Finding:
    changed = torch.zeros_like(audit.missed)
    noise = audit.noise(audit.x, "zero_gradient")
    for _ in range(4):
        near = clip(audit.x, random_in_ball(audit.x, audit.norm, audit.eps, noise), audit.norm, audit.eps)
        changed |= (audit.model(near) != audit.logits).any(1)
    text = "the gradient of every loss is exactly zero though the output changes with the image"
    return audit.share(is_zero(audit.margin_gradient) & changed, text)


def float64_gradient(audit: Audit) -> Finding:
    text = "where plain PGD ends, the gradient of the cross-entropy has another direction in float64 than in float32"
    return audit.share(audit.turned, text)


def step_length(audit: Audit) -> Finding:
    length = norms(ascent_direction(audit.ce_gradient, "L2"), "L2").mean().item()
    text = f"a normalised step along the cross-entropy has {length:.2f} of the requested length"
    return Finding(length, text, below=True)


def consistency(audit: Audit) -> Finding:
    """Noise hardly turns the gradient of a smooth network."""
    audit.require_deterministic()
    alive, cosines = _alive(audit), []
    for salt in ("consistency/0", "consistency/1"):
        near = audit.x + random_in_ball(audit.x, audit.norm, audit.eps / 2, audit.noise(audit.x, salt))
        cosines.append(cosine(audit.margin_gradient, audit.gradient(losses.margin, near))[alive])
    median = torch.stack(cosines).median().item()
    text = f"the median cosine between the margin's gradients at an image and close to it is {median:.2f}"
    return Finding(median, text, below=True)


def slope(audit: Audit) -> Finding:
    """Central differences along the gradient, over a fiftieth of the ball, against what it predicts."""
    audit.require_deterministic()
    alive = _alive(audit)
    step = ascent_direction(audit.margin_gradient, audit.norm) * (audit.eps / 50)
    predicted = 2 * (step * audit.margin_gradient).sum((1, 2, 3))
    ahead, behind = (losses.margin(audit.model(audit.x + side), audit.y) for side in (step, -step))
    off = ~(((ahead - behind) / predicted - 1).abs() <= 0.5)  # also where it is not a number
    count, of = int((off & alive).sum()), int(alive.sum())
    text = "the change of the margin along its gradient is below 0.5 or above 1.5 times the prediction"
    return Finding(count / of, f"{text} on {count} of {of} samples")


def _alive(audit: Audit) -> Tensor:
    alive = ~is_zero(audit.margin_gradient)
    if not alive.any():
        raise NotMeasured("every gradient of the margin is zero")
    return alive


# --- the path of plain PGD ---------------------------------------------------------------------------------


def monotone(audit: Audit) -> Finding:
    """A larger ball contains the smaller one, so plain PGD should not fool fewer samples in it."""
    changes = [
        (int((smaller & ~larger).sum()), int((larger & ~smaller).sum()))
        for smaller, larger in itertools.pairwise(audit.balls.values())
    ]
    lost, won = max(changes, key=lambda change: change[0] - change[1])
    shares = [f"{100 * (1 - fooled.float().mean().item()):.0f} % ({name})" for name, fooled in audit.balls.items()]
    text = f"accuracy under plain PGD in growing balls: {', '.join(shares)}"
    return Finding(max(0.0, (lost - won) / audit.n), text, mcnemar(lost, won, one_sided=True))


def silent_success(audit: Audit) -> Finding:
    wrong = audit.plain.wrong
    text = "plain PGD passes an adversarial example but does not end on one"
    return audit.share(wrong.any(1) & ~wrong[:, -1], text)


def zero_on_path(audit: Audit) -> Finding:
    before = audit.plain.wrong.cumsum(1)[:, :-1] == 0  # the first adversarial example
    share = ((audit.plain.zero[:, :-1] & before).sum(1) / before.sum(1).clamp_min(1)).mean().item()
    return Finding(share, f"the gradient of the cross-entropy is zero at {100 * share:.0f} % of plain PGD's steps")


def incomplete(audit: Audit) -> Finding:
    best = _failed(audit).cummax(1).values
    count = int((best[:, -1] - best[:, -1 - max(1, audit.steps // 4)] > 0.05).sum())
    text = (
        f"the margin still rises in the last quarter of plain PGD's steps on {count} of the {len(best)} of {audit.n} "
        "samples that it misses"
    )
    return Finding(count / audit.n, text)


def break_point(audit: Audit) -> Finding:
    """The angle at the point of the curve that is farthest from its chord: near 1 if the loss rises in a straight line
    to the end, near 0 if it soon reaches its maximum."""
    loss = _failed(audit)
    time = torch.linspace(0, 1, loss.shape[1], device=loss.device)
    off = (loss - torch.lerp(loss[:, :1], loss[:, -1:], time)).abs()
    knee = off[:, 1:-1].argmax(1, keepdim=True) + 1
    before, after = (
        torch.cat([time[knee] - time[end], loss.gather(1, knee) - loss[:, end, None]], 1) for end in (0, -1)
    )
    mean = torch.cosine_similarity(before, after).abs().mean().item()
    return Finding(mean, f"the break-point angle of plain PGD's loss has a mean |cosine| of {mean:.2f}")


def increasing_loss(audit: Audit) -> Finding:
    cost = 1 - _failed(audit)  # what Pintor et al. minimise
    rises = cost.diff(dim=1) > 0
    height = ((cost[:, 1:] + cost[:, :-1]) / 2 * rises).sum(1) / rises.sum(1).clamp_min(1)
    mean = height.mean().item()
    return Finding(mean, f"the steps of plain PGD that lower the margin have a mean height of {mean:.2f}")


def _failed(audit: Audit) -> Tensor:
    """The margin along the paths that fail (m, steps + 1), scaled to [0, 1]. (Cross-entropy is exponential in it, and
    always seems to rise at the end.)"""
    margin = audit.plain.margin[~audit.plain.wrong.any(1)]
    if len(margin) < _FEW:
        raise NotMeasured(f"plain PGD misses {len(margin)} samples, too few for a statement about its paths")
    low, high = margin.amin(1, keepdim=True), margin.amax(1, keepdim=True)
    return (margin - low) / (high - low).clamp_min(torch.finfo(margin.dtype).tiny)


# --- the paper's formula -----------------------------------------------------------------------------------


def paper_step_length(audit: Audit) -> Finding:
    length = _paper_length(audit.ce_gradient)
    mean, under = length.mean().item(), int((length < 1).sum())
    text = (
        f"a step by the paper's formula (floor {_PAPER_FLOOR:g}, batch of {_PAPER_BATCH}) has {mean:.2f} of the "
        f"requested length at the image; {under} of {audit.n} gradients are below the floor"
    )
    return Finding(mean, text, below=True)


def paper_formula(audit: Audit) -> Finding:
    """From the same start, so that only the length of the steps differs from plain PGD."""
    audit.require_deterministic()
    if audit.norm != "L2":
        raise NotMeasured("the paper's formula is that of L2")
    found = ~audit.missed
    count = int((found & ~audit.pgd("plain", found, direction=_paper_direction)).sum())
    p = mcnemar(count, 0, one_sided=True)
    text = (
        f"PGD by the paper's formula, whose steps shrink with the gradient, misses {count} of the {int(found.sum())} "
        f"of {audit.n} samples that plain PGD fools (p = {p:.1g})"
    )
    return Finding(count / audit.n, text, p)


def _paper_direction(gradient: Tensor, norm: Norm) -> Tensor:
    return ascent_direction(gradient, norm) * _paper_length(gradient)


def _paper_length(gradient: Tensor) -> Tensor:
    """The length, at most 1, of the paper's step of unit length along gradients (B, C, H, W): (B, 1, 1, 1)."""
    size = norms(gradient, "L2").double() / _PAPER_BATCH
    return (size / size.clamp_min(_PAPER_FLOOR)).to(gradient.dtype)

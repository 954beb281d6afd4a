"""Symptoms: properties of the model and its gradients that can mislead attacks; and the paper's formula.

Each check is a function of the audit.
"""

import torch
from torch import Tensor

from aerl.analyses.masking.audit import Audit, Finding, NotMeasured, cosine, is_zero
from aerl.attacks import losses
from aerl.attacks.projections import ascent_direction, clip, norms, random_in_ball
from aerl.evaluation.metrics import probability
from aerl.evaluation.statistics import mcnemar
from aerl.types import Norm

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


def zero_gradient(audit: Audit) -> Finding:
    changed = torch.zeros_like(audit.missed)
    noise = audit.noise(audit.x, "zero_gradient")
    for _ in range(4):
        near = clip(audit.x, random_in_ball(audit.x, audit.norm, audit.eps, noise), audit.norm, audit.eps)
        changed |= (audit.model(near) != audit.logits).any(1)
    text = "the gradient of every loss is exactly zero though the output changes with the image"
    return audit.share(is_zero(audit.margin_gradient) & changed, text)


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


# --- the paper's formula -----------------------------------------------------------------------------------


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
        f"samples that plain PGD fools (of {audit.n}, p = {p:.1g})"
    )
    return Finding(count / audit.n, text, p)


def _paper_direction(gradient: Tensor, norm: Norm) -> Tensor:
    return ascent_direction(gradient, norm) * _paper_length(gradient)


def _paper_length(gradient: Tensor) -> Tensor:
    """The length, at most 1, of the paper's step of unit length along gradients (B, C, H, W): (B, 1, 1, 1)."""
    size = norms(gradient, "L2").double() / _PAPER_BATCH
    return (size / size.clamp_min(_PAPER_FLOOR)).to(gradient.dtype)

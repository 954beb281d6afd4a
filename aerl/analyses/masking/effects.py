"""Effects: attacks that fool samples which plain PGD misses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerl.analyses.masking.audit import Audit, Finding, NotMeasured
from aerl.attacks import AutoAttack, SampleGenerator, losses
from aerl.attacks.projections import clip, random_in_ball
from aerl.evaluation.statistics import mcnemar, right

_ATHALYE = "Athalye et al. 2018, section 3.1"
_CARLINI = "Carlini & Wagner 2017, sections V and VIII"
_DRAWS, _PASSES = 32, 5  # of noise; averaged in each step of EOT


@dataclass(frozen=True)
class Effect:
    """An attack: its name in sentences, the option that runs it ("" for none), its source, and the samples that it
    fools, bool (n,)."""

    name: str
    option: str
    source: str
    fooled: Callable[[Audit], Tensor]

    def __call__(self, audit: Audit) -> Finding:
        """Compare the attack, on the samples that plain PGD misses, with a second start of plain PGD."""
        gained, rival = self.fooled(audit) & audit.missed, audit.again
        versus = f", a second start {int(rival.sum())}"
        if self is EFFECTS["restarts"]:
            rival, versus = torch.zeros_like(rival), ""
        p = mcnemar(int((gained & ~rival).sum()), int((rival & ~gained).sum()), one_sided=True)
        count, missed = int(gained.sum()), int(audit.missed.sum())
        text = f"{self.name} fools {count} of the {missed} samples (of {audit.n}) that plain PGD misses{versus}"
        return Finding(count / audit.n, f"{text} (p = {p:.1g})", p)


def _float64(audit: Audit) -> Tensor:
    def attack(model: nn.Module, x: Tensor, y: Tensor, *, generator: SampleGenerator) -> Tensor:
        return audit.attack()(model, x.double(), y, generator=generator).float()

    return audit.fooled("again", attack, audit.missed & audit.turned)


def _noise(audit: Audit) -> Tensor:
    def best_draw(model: nn.Module, x: Tensor, y: Tensor, *, generator: SampleGenerator) -> Tensor:
        steps = [random_in_ball(x, audit.norm, audit.eps, generator) for _ in range(_DRAWS)]
        draws = torch.stack([clip(x, step, audit.norm, audit.eps) for step in steps])
        best = torch.stack([losses.margin(model(draw), y) for draw in draws]).argmax(0)
        return draws[best, torch.arange(len(x), device=x.device)]

    return audit.fooled("noise", best_draw)


def _square(audit: Audit) -> Tensor:
    """In one batch: the samples of a batch share Square's random numbers."""
    attack = AutoAttack(norm=audit.norm, eps=audit.eps, attacks=["square"], queries=audit.queries)
    return audit.fooled("square", attack, batch_size=audit.n)


def _transfer(audit: Audit) -> Tensor:
    """By the run's transferred examples that are within its threat model and were made for all samples."""
    used = [
        name
        for name, info in audit.context.attacks.items()
        if name.startswith("transfer") and not name.endswith("_refined") and info["counts"] and info["alone"]
    ]
    if not used:
        raise NotMeasured("no source; add attack=transfer")
    return ~torch.from_numpy(right(audit.context.outcomes, used))[audit.rows].to(audit.y.device)


def _eot(audit: Audit) -> Tensor:
    """For a deterministic model this is plain PGD."""
    if not audit.randomised.any():
        return ~audit.missed
    return audit.pgd("plain", eot=_PASSES)


EFFECTS = {
    "restarts": Effect("PGD with a second start", "attack=pgd attack.pgd.restarts=5", _ATHALYE, lambda a: a.again),
    "more_steps": Effect(
        "PGD with more steps", "attack=pgd attack.pgd.steps=500", _ATHALYE,
        lambda a: a.pgd("more_steps", steps=2 * a.steps, step_size=a.eps / 20),
    ),
    "log_odds": Effect(
        "PGD on the log-odds", "attack=pgd", _CARLINI, lambda a: a.pgd("log_odds", loss="log_odds"),
    ),
    "margin": Effect("PGD on the margin", "attack=pgd_margin", _CARLINI, lambda a: a.pgd("margin", loss="margin")),
    "logit_scale": Effect(
        "PGD on rescaled logits", "attack=pgd_rescaled", "Croce & Hein 2020, section 4",
        lambda a: a.pgd("logit_scale", loss="rescaled_ce"),
    ),
    "float64": Effect("PGD in float64 (where it turns the gradient)", "", "Lee et al. 2020", _float64),
    "fgsm": Effect(
        "FGSM", "attack=fgsm", _ATHALYE, lambda a: a.pgd("fgsm", steps=1, step_size=a.eps, random_start=False)
    ),
    "noise": Effect(f"the best of {_DRAWS} random points", "attack=noise", _ATHALYE, _noise),
    "square": Effect("Square", "attack=square", _ATHALYE, _square),
    "transfer": Effect("transfer", "attack=transfer", _ATHALYE, _transfer),
    "eot": Effect("PGD averaged over passes", "attack=pgd attack.pgd.eot=8", "Athalye et al. 2018, section 4.2", _eot),
}  # fmt: skip


def unbounded(audit: Audit) -> Finding:
    """Plain PGD must fool every sample if its ball contains the box."""
    count = audit.n - int(audit.balls["unbounded"].sum())
    return Finding(count / audit.n, f"{count} of {audit.n} samples withstand plain PGD with the box as its ball")

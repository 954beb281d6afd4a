"""Effects: attacks that fool samples which plain PGD misses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aerl.analyses.masking.audit import Audit, Finding, NotMeasured
from aerl.attacks import Adaptive, AutoAttack
from aerl.evaluation.statistics import mcnemar, right

_ATHALYE = "Athalye et al. 2018, section 3.1"
_CARLINI = "Carlini & Wagner 2017, sections V and VIII"


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


def _adaptive(audit: Audit) -> Tensor:
    attack = Adaptive(norm=audit.norm, eps=audit.eps, steps=audit.steps)
    if not attack.stages(audit.model, audit.x[:16]):
        raise NotMeasured("the model's gradients need no remedy")
    return audit.fooled("adaptive", attack)


EFFECTS = {
    "restarts": Effect("PGD with a second start", "attack=pgd attack.pgd.restarts=5", _ATHALYE, lambda a: a.again),
    "more_steps": Effect(
        "PGD with more steps", "attack=pgd attack.pgd.steps=500", _ATHALYE,
        lambda a: a.pgd("more_steps", steps=2 * a.steps, step_size=a.eps / 20),
    ),
    "log_odds": Effect(
        "PGD on the log-odds", "attack=pgd", _CARLINI, lambda a: a.pgd("log_odds", loss="log_odds"),
    ),
    "adaptive": Effect("PGD that adapts", "attack=adaptive", "Athalye et al. 2018, section 4", _adaptive),
    "square": Effect("Square", "attack=square", _ATHALYE, _square),
    "transfer": Effect("transfer", "attack=transfer", _ATHALYE, _transfer),
}  # fmt: skip


def unbounded(audit: Audit) -> Finding:
    """Plain PGD must fool every sample if its ball contains the box."""
    count = audit.n - int(audit.unbounded.sum())
    return Finding(count / audit.n, f"{count} of {audit.n} samples withstand plain PGD with the box as its ball")

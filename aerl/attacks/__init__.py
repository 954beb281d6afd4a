"""Attacks: `attack(model, x, y, *, generator=0) -> x_adv`, in [0, 1] and within eps of x (`PaperPGD` leaves the box).

`model` maps images x (B, C, H, W) in [0, 1] to logits (B, K); y (B,) are their classes. `generator` is a seed or a
torch.Generator. `PGD(eps=0.5, steps=20)` is `pgd` with its settings, as an object.

In each of them the model is in eval mode with frozen parameters and computes in float32, all of it restored
afterwards, and the global random state is neither used nor changed.
"""

from aerl.attacks.adaptive import Adaptive
from aerl.attacks.autoattack import AutoAttack
from aerl.attacks.fmn import fmn
from aerl.attacks.modes import NoGradient, attacking, collect_warnings, evaluating, frozen, predictions, warn
from aerl.attacks.noise import noise
from aerl.attacks.paper import PaperPGD
from aerl.attacks.pgd import PGD, pgd
from aerl.attacks.protocol import Attack, AttackSpec
from aerl.attacks.random import BatchGenerator, Noise, SampleGenerator
from aerl.attacks.straight_through import straight_through
from aerl.attacks.transfer import Crafted, Transfer

__all__ = [
    "PGD", "Adaptive", "Attack", "AttackSpec", "AutoAttack", "BatchGenerator", "Crafted", "NoGradient", "Noise",
    "PaperPGD", "SampleGenerator", "Transfer", "attacking", "collect_warnings", "evaluating", "fmn", "frozen", "noise",
    "pgd", "predictions", "straight_through", "warn",
]  # fmt: skip

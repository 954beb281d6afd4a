"""Attacks: `attack(model, x, y, *, generator) -> x_adv`, in [0, 1] and within eps of x (`PaperPGD` leaves the box).

In each of them the model is in eval mode with frozen parameters and computes in float32, all of it restored
afterwards, and the global random state is neither used nor changed.
"""

from aerl.attacks.adaptive import Adaptive
from aerl.attacks.autoattack import AutoAttack
from aerl.attacks.fmn import fmn
from aerl.attacks.modes import NoGradient, attacking, collect_warnings, evaluating, frozen, predictions, warn
from aerl.attacks.noise import noise
from aerl.attacks.paper import PaperPGD
from aerl.attacks.pgd import pgd
from aerl.attacks.protocol import Attack, AttackSpec
from aerl.attacks.random import BatchGenerator, Noise, SampleGenerator
from aerl.attacks.straight_through import straight_through
from aerl.attacks.transfer import Crafted, Transfer

__all__ = [
    "Adaptive", "Attack", "AttackSpec", "AutoAttack", "BatchGenerator", "Crafted", "NoGradient", "Noise", "PaperPGD",
    "SampleGenerator", "Transfer", "attacking", "collect_warnings", "evaluating", "fmn", "frozen", "noise", "pgd",
    "predictions", "straight_through", "warn",
]  # fmt: skip

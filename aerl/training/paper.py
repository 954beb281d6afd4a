"""The adversarial examples on which the paper's released code trains its policy gradient, for reproduction only."""

import torch
from torch import Generator, Tensor, nn

from aerl.attacks import BatchGenerator, frozen
from aerl.training.objectives import EpsilonGreedy, policy_loss
from aerl.types import NonNegative, Probability


def rewarded_fgsm(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: BatchGenerator, eps: NonNegative,
    exploration: Probability, probability_floor: Probability,
) -> Tensor:  # fmt: skip
    """x + eps * sign(gradient of the policy loss), in [0, 1]: `adv_update` of policy_gradient_epsilon.py.

    The actions are drawn as in training, and the model is in the mode that training has it in, with Dropout. An image
    whose action is not its label has no gradient and stays as it is. x (B, C, H, W) in [0, 1], y (B,).
    """
    draws: Generator = generator.generator
    with frozen(model), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        logits = model(point)
        actions = EpsilonGreedy(exploration if model.training else 0.0, coin="batch")(logits.detach(), y, draws)
        (gradient,) = torch.autograd.grad(policy_loss(logits, y, actions, probability_floor).sum(), point)
    return (x + eps * gradient.sign()).clamp(0, 1)

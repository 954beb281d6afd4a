"""Objectives of adversarial training beyond `adversarial_training` and `trades`."""

from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from aerl.attacks.losses import kl
from aerl.training import objectives
from aerl.training.objectives import Act, Loss
from aerl.types import NonNegative


def mart(
    model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator, weight: float
) -> Loss:  # fmt: skip
    """MART (Wang et al. 2020, equation 11): boosted cross-entropy on x_adv, -log p_y - log(1 - max_{k != y} p_k), plus
    `weight` * KL(prediction on x || on x_adv) * (1 - p_y on x). Cross-entropy on x where there are no x_adv.

    Of mixed labels (B, K) the largest counts.
    """
    clean, y = model(x), objectives.largest(y)
    metrics = {"accuracy": (clean.detach().argmax(1) == y).float().mean()}
    if x_adv is None:
        return F.cross_entropy(clean, y), metrics
    attacked = model(x_adv)
    log_p = attacked.log_softmax(1)
    other = log_p.scatter(1, y[:, None], -torch.inf).amax(1)
    boosted = F.nll_loss(log_p, y) - torch.log1p(-other.exp().clamp_max(1 - 1e-6)).mean()  # p_k is 1 in float32
    missed = 1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
    adversarial_loss = (kl(attacked, clean) * missed).mean()
    return boosted + weight * adversarial_loss, metrics | {"adversarial_loss": adversarial_loss}


class WeightPerturbation(nn.Module):
    """Adversarial weight perturbation (Wu et al. 2020, section 4): another objective at weights that are worse for it.

    Each weight matrix or kernel w is moved along the gradient g of the objective by `gamma` * ||w|| * g / ||g||; the
    step is taken from the original weights, with the gradient there. It costs one more forward and backward pass.
    """

    mixed_labels = True

    def __init__(
        self, *, act: Act, weight: float, probability_floor: float, gamma: NonNegative = 0.005,
        objective: Literal["adversarial_training", "trades"] = "adversarial_training",
    ) -> None:  # fmt: skip
        super().__init__()
        self.objective, self.gamma = getattr(objectives, objective), gamma
        self.settings = {"act": act, "probability_floor": probability_floor}
        if objective == "trades":
            self.settings["weight"] = weight

    def forward(
        self, model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator
    ) -> Loss:  # fmt: skip
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # BatchNorm's, which must not change

        def score(changes: dict[str, Tensor], generator: Generator) -> Loss:
            def changed(images: Tensor) -> Tensor:
                logits: Tensor = functional_call(model, changes, (images,))
                return logits

            loss: Loss = self.objective(changed, x, y, x_adv=x_adv, generator=generator, **self.settings)
            return loss

        first, _ = score({**weights, **buffers}, generator.clone_state())
        slopes = torch.autograd.grad(first.mean(), list(weights.values()), allow_unused=True)
        moved = {}
        for (name, weight), slope in zip(weights.items(), slopes, strict=True):
            if slope is not None:
                scale = self.gamma * weight.detach().norm() / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny)
                moved[name] = weight + scale * slope.detach()
        return score(moved, generator)

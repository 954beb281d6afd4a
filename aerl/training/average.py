"""A moving average of the weights while they are trained."""

import copy

import torch
from torch import nn


class Average(nn.Module):
    """`model`: after every step, decay * itself + (1 - decay) * the trained weights.

    Statistics of BatchNorm are averaged, too; counters are copied. At first the decay is (1 + step) / (10 + step), if
    that is smaller, so that the weights from before training are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self.decay, self.steps = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, trained: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own, new = self.model.state_dict(), trained.state_dict()
        floats = [name for name, tensor in own.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floats], [new[name] for name in floats], 1 - decay)
        for name in own.keys() - set(floats):
            own[name].copy_(new[name])

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, steps: int) -> None:
        self.steps = steps

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
        # Both keep their tensors, so that a step need not look for them: load_state_dict copies into them, too.
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the model that is trained."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_([own for own, _ in self._floats], [new for _, new in self._floats], 1 - decay)
        for own, new in self._counters:
            own.copy_(new)

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, steps: int) -> None:
        self.steps = steps

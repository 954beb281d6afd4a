"""REINFORCE with a baseline, several draws and an entropy bonus, against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aerl.errors import UserError
from aerl.runtime.device import stream
from aerl.training.objectives import EpsilonGreedy, GeneralizedCrossEntropy, Labels, policy_gradient, policy_loss
from aerl.training.reinforce import Reinforce

GREEDY = EpsilonGreedy(0.0)


@pytest.fixture
def logits() -> torch.Tensor:
    return (1.5 * torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).requires_grad_()


LABELS = torch.tensor([0, 1, 2, 3])


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def mean_gradient(objective, logits, draws=60_000):
    """Over many draws of an action: each sample repeated; `logits` are the model's output and the input."""
    many, labels = logits.detach().repeat(draws, 1).requires_grad_(), LABELS.repeat(draws)
    loss, _ = objective(nn.Identity(), many, labels, x_adv=None, generator=stream(1, "draws"))
    return gradient(loss, many).view(draws, *logits.shape).sum(0)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_generalized_cross_entropy_has_the_gradient_of_its_closed_form(logits, q):
    """(1 - p^q) / q, and cross-entropy at q=0 (Zhang & Sabuncu 2018, equation 6)."""
    p = logits.softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    expected = (1 - p**q) / q if q else F.cross_entropy(logits, LABELS, reduction="none")
    weights = GeneralizedCrossEntropy(q)(logits.detach(), LABELS, stream(0))
    torch.testing.assert_close(
        gradient(policy_loss(logits, LABELS, weights).sum(), logits), gradient(expected.sum(), logits)
    )


@pytest.mark.parametrize(
    "settings",
    [{"baseline": "batch"}, {"baseline": "running"}, {"baseline": "leave_one_out", "draws": 3}, {"draws": 2}],
)
def test_no_baseline_changes_the_mean_gradient(logits, settings):
    """On-policy it is that of 1 - p_y, whatever is subtracted (Williams 1992, theorem 1)."""
    objective = Reinforce(act=GREEDY, weight=0.0, **settings)
    objective.average.fill_(0.7)
    expected = gradient((1 - logits.softmax(1).gather(1, LABELS[:, None])).mean(), logits)
    # Standard error of a term in [-1, 1] over 60,000 draws, divided by the 4 samples: 0.001.
    torch.testing.assert_close(mean_gradient(objective, logits), expected, rtol=0, atol=0.005)


def test_without_baseline_and_bonus_it_is_the_policy_gradient(logits):
    settings = {"x_adv": logits.detach() + 0.1, "act": EpsilonGreedy(0.2)}
    model = nn.Identity()
    loss, metrics = Reinforce(weight=0.5, act=Labels())(model, logits, LABELS, generator=stream(3), **settings)
    expected, others = policy_gradient(
        model, logits, LABELS, generator=stream(3), weight=0.5, probability_floor=0.0, **settings
    )
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))
    torch.testing.assert_close({name: metrics[name] for name in others}, others)


def test_the_bonus_is_the_entropy_of_the_policy(logits):
    plain, bonus = (Reinforce(act=Labels(), weight=0.0, entropy=entropy) for entropy in (0.0, 0.3))
    losses = [o(nn.Identity(), logits, LABELS, x_adv=None, generator=stream(0))[0] for o in (plain, bonus)]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(losses[0] - losses[1], 0.3 * entropy)


def test_the_running_mean_is_of_earlier_steps_and_survives_a_checkpoint(logits):
    objective = Reinforce(act=Labels(), weight=0.0, baseline="running", decay=0.9)
    first, second = (
        objective(nn.Identity(), logits, LABELS, x_adv=None, generator=stream(0))[0].item() for _ in range(2)
    )
    assert second == pytest.approx(0.9 * first)  # the reward is 1, the mean 0 and then 0.1
    other = Reinforce(act=Labels(), weight=0.0, baseline="running", decay=0.9)
    other.load_state_dict(objective.state_dict())
    assert other.average.item() == pytest.approx(0.19)


def test_exploration_changes_linearly():
    act = EpsilonGreedy(0.2, final_exploration=0.0)
    assert [act.at(p).exploration for p in (0.0, 0.5, 1.0)] == [0.2, 0.1, 0.0]
    assert EpsilonGreedy(0.2).at(0.5) == EpsilonGreedy(0.2)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="try draws=2"):
        Reinforce(act=GREEDY, weight=0.0, baseline="leave_one_out")
    with pytest.raises(UserError, match="draws nothing"):
        Reinforce(act=EpsilonGreedy(expected=True), weight=0.0)

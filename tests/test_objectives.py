"""The policy loss and how actions are drawn, against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aerl.attacks import BatchGenerator
from aerl.runtime.device import stream
from aerl.training.objectives import EpsilonGreedy, Labels, policy_loss
from aerl.training.paper import rewarded_fgsm


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 0])


def closed_form(logits, labels, exploration):
    """The gradient of (1 - e)(1 - pi_y) + (e / K) CE."""
    pi_y = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    value = (1 - exploration) * (1 - pi_y) + exploration / 5 * F.cross_entropy(logits, labels, reduction="none")
    return torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]


def test_acting_by_the_label_is_cross_entropy(batch):
    logits, labels = batch
    loss = policy_loss(logits, labels, Labels()(logits, labels, stream(0))).mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels), rtol=0, atol=0)


@pytest.mark.parametrize("exploration", [0.0, 0.1, 1.0])
def test_the_policy_gradient_is_that_of_the_closed_form(batch, exploration):
    """The mean over many draws, and the expected one exactly."""
    logits, labels = batch
    expected, draws = closed_form(logits, labels, exploration), 40_000
    many, repeated = logits.detach().repeat(draws, 1), labels.repeat(draws)
    actions = EpsilonGreedy(exploration)(many, repeated, stream(3, "actions"))
    rewarded = (actions == repeated).view(draws, -1).double().mean(0)
    # One CE gradient per sample, weighted by how often it was rewarded: what the loop sums up, drawn often.
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    (sampled,) = torch.autograd.grad((rewarded * cross_entropy).sum(), logits, retain_graph=True)
    # The standard error of a rate over 40,000 draws is at most 0.0025, and |dCE/dlogit| <= 1.
    torch.testing.assert_close(sampled, expected, rtol=0, atol=0.012)
    behaviour = EpsilonGreedy(exploration, expected=True)(logits.detach(), labels, stream(0))
    torch.testing.assert_close(behaviour.sum(1), torch.ones(6, dtype=torch.float64))
    (exact,) = torch.autograd.grad(policy_loss(logits, labels, behaviour).sum(), logits)
    torch.testing.assert_close(exact, expected)


def test_actions_are_the_draws_of_multinomial():
    """Chi-square of 200,000 draws from one policy, and the same draws as torch.multinomial."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0])
    many, behaviour = logits.expand(200_000, -1), 0.9 * logits.softmax(0) + 0.02
    actions = EpsilonGreedy(0.1)(many, torch.zeros(len(many)), stream(5))
    expected = behaviour * len(many)
    chi_square = ((actions.bincount(minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand times
    drawn = torch.multinomial(0.9 * many.softmax(1) + 0.1 / 5, 1, generator=stream(5)).squeeze(1)
    assert torch.equal(actions, drawn)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_have_such_a_loss(bad):
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    logits[1:3] = bad
    actions = EpsilonGreedy(0.1)(logits, labels, stream(0))
    assert not policy_loss(logits, labels, actions)[1:3].isfinite().any()


def test_a_coin_per_sample_explores_within_a_batch_and_one_per_batch_does_not():
    """A policy that is sure of class 0: whatever else is drawn was exploration."""
    logits, labels = torch.full((2_000, 4), -1e4), torch.zeros(2_000, dtype=torch.int64)
    logits[:, 0] = 0
    generator = stream(0, "coin")
    assert abs((EpsilonGreedy(0.5)(logits, labels, generator) != 0).float().mean() - 0.5 * 3 / 4) < 0.05
    per_batch = [EpsilonGreedy(0.5, "batch")(logits, labels, generator) != 0 for _ in range(20)]
    shares = {round(explored.float().mean().item(), 1) for explored in per_batch}
    assert shares <= {0.0, 0.7, 0.8} and len(shares) > 1


def test_probability_floor_is_that_of_the_paper_s_code():
    """policy_gradient_epsilon.py: softmax + 1e-6, normalised, and 1e-6 again in the logarithm."""
    logits, labels = torch.tensor([[0.0, 30.0], [0.0, 1.0]], requires_grad=True), torch.tensor([0, 0])
    loss = policy_loss(logits, labels, labels, 1e-6)
    policy = logits.softmax(1) + 1e-6
    policy = policy / policy.sum(1, keepdim=True)
    torch.testing.assert_close(loss, -(policy[:, 0] + 1e-6).log())
    (floored,) = torch.autograd.grad(loss.sum(), logits)
    (plain,) = torch.autograd.grad(policy_loss(logits, labels, labels).sum(), logits)
    assert floored[0].abs().max() < 1e-6 and plain[0].abs().max() > 0.99
    torch.testing.assert_close(floored[1], plain[1], rtol=1e-4, atol=0)


def test_the_paper_s_fgsm_moves_rewarded_images_only():
    """On a linear network the gradient of a rewarded sample is known; the others have none."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.full((64, 1, 2, 2), 0.5), torch.arange(64) % 3
    settings = {"eps": 0.1, "exploration": 0.5, "probability_floor": 0.0}
    x_adv = rewarded_fgsm(net.train(), x, y, generator=BatchGenerator(stream(0), 64), **settings)
    with torch.no_grad():
        logits = net(x)
        rewarded = EpsilonGreedy(0.5, "batch")(logits, y, stream(0)) == y
        direction = (logits.softmax(1) - F.one_hot(y, 3)) @ net[1].weight
    assert 0 < rewarded.sum() < 64 and net[1].weight.requires_grad and net.training
    expected = torch.where(rewarded[:, None], 0.5 + 0.1 * direction.sign(), torch.tensor(0.5))
    torch.testing.assert_close(x_adv.flatten(1), expected)

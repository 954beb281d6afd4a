"""aerl's PGD against torchattacks and foolbox, and the paper's against cleverhans' formula, on real digits."""

import copy

import pytest
import torch
import torch.nn.functional as F

from aerl.attacks import PaperPGD, pgd
from tests.nets import Through, digits_net, noise_for, wrong

NORMS = [("L2", 0.5), ("Linf", 0.1)]


@pytest.fixture(scope="module")
def unseen():
    """A network trained on 1,197 digits, and the 600 others: more than the 360 of the test split."""
    return digits_net(classes=10, epochs=8, unseen=600)


def others(library, model, x, y, norm, eps, steps):
    """The library's PGD from the clean images, its last iterate."""
    theirs = pytest.importorskip(library, reason=f"{library} is of the bench extra")
    if library == "torchattacks":
        kind = theirs.PGDL2 if norm == "L2" else theirs.PGD
        return kind(model, eps=eps, alpha=eps / 10, steps=steps, random_start=False)(x, y)
    kind = theirs.attacks.L2PGD if norm == "L2" else theirs.attacks.LinfPGD
    attack = kind(rel_stepsize=0.1, steps=steps, random_start=False)
    return attack(theirs.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1]


@pytest.mark.parametrize(("norm", "eps"), NORMS)
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_pgd_agrees_with_other_libraries(unseen, library, norm, eps):
    model, x, y = unseen
    expected = wrong(model, others(library, model, x, y, norm, eps, steps=40), y).double().mean()
    assert len(x) == 600 and 0.1 < expected < 0.9
    settings = {"norm": norm, "eps": eps, "steps": 40, "random_start": False}
    matched = {"loss": "ce", "drop_fooled": False, "keep": "last"}
    for choice in (matched, {}):
        adversarial = pgd(model, x, y, generator=noise_for(x, 0), **settings | choice)
        assert abs(wrong(model, adversarial, y).double().mean() - expected) <= 0.005


def cleverhans(model, x, y, eta, norm, eps, step_size, steps):
    """Its projected_gradient_descent on one batch from x + eta, clip_min=None and clip_max=None."""

    def size(t):
        return t.pow(2).sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()

    def clip_eta(eta):
        return eta.clamp(-eps, eps) if norm == "Linf" else eta * torch.minimum(torch.ones(()), eps / size(eta))

    adv_x = x + clip_eta(eta)
    for _ in range(steps):
        adv_x = adv_x.clone().detach().requires_grad_()
        F.cross_entropy(model(adv_x), y).backward()
        step = adv_x.grad.sign() if norm == "Linf" else adv_x.grad / size(adv_x.grad)
        adv_x = x + clip_eta(adv_x.detach() + step_size * step - x)
    return adv_x


@pytest.mark.parametrize(("norm", "eps", "confidence"), [("L2", 0.5, 1), ("L2", 0.5, 100), ("Linf", 0.1, 1)])
def test_the_papers_pgd_is_cleverhans(unseen, norm, eps, confidence):
    network, x, y = unseen
    model = Through(copy.deepcopy(network).double(), lambda logits: logits * confidence)
    x, y = x[:64].double(), y[:64]
    eta = (2 * noise_for(x, 5).uniform(x) - 1) * eps
    expected = cleverhans(model, x, y, eta, norm, eps, eps / 10, steps=50)

    def attack(batch_size, n):
        paper = PaperPGD(norm=norm, eps=eps, steps=50, batch_size=batch_size)
        return paper(model, x[:n], y[:n], generator=noise_for(x[:n], 5))

    found = attack(64, 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.min() < 0 and found.max() > 1  # it has no box
    # Samples left out of the batch change nothing for the others; a larger batch weakens the steps in L2.
    torch.testing.assert_close(attack(64, 20), expected[:20], rtol=0, atol=1e-5)
    assert torch.allclose(attack(10**12, 64), expected, rtol=0, atol=1e-5) == (norm == "Linf")
    # Sharper logits change no decision, but they stop this attack, and not ours.
    ours = pgd(model, x, y, generator=noise_for(x, 5), norm=norm, eps=eps, steps=50)
    missed = wrong(model, ours, y).sum() - wrong(model, expected, y).sum()
    assert (missed > 5) == (confidence > 1)

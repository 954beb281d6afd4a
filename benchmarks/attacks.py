"""PGD: aerl against a bare loop of forward and input gradient, and against other implementations."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks import SampleGenerator, attacking, pgd
from aerl.data import DataSplits, subset, to_unit
from aerl.hardware import Hardware
from aerl.results import eps_text
from benchmarks.paired import ratio, time_in_turns

Call = Callable[[], Tensor]


def bare_loop(model: nn.Module, x: Tensor, y: Tensor, *, norm: str, eps: float, steps: int) -> Tensor:
    """What no PGD can do without: one forward and one input gradient a step, and the update."""
    with attacking(model):
        x_adv = x.clone()
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
            if norm == "Linf":
                delta = (x_adv.detach() - x + eps / 10 * gradient.sign()).clamp(-eps, eps)
            else:
                delta = (
                    x_adv.detach()
                    - x
                    + eps / 10 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                )
                delta = delta * (eps / delta.flatten(1).norm(dim=1).clamp(min=eps)).view(-1, 1, 1, 1)
            x_adv = (x + delta).clamp(0, 1)
        model(x_adv)  # every attack looks once at where it ended
    return x_adv


def cleverhans_formula(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    """L2 PGD as cleverhans writes it: batch-mean cross-entropy, the norm floored at 1e-6, clipping, all steps."""

    def project(delta: Tensor) -> Tensor:
        norm = delta.pow(2).sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
        return delta * (eps / norm).clamp(max=1)

    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        norm = gradient.pow(2).sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
        x_adv = (x + project(x_adv.detach() + eps / 10 * gradient / norm - x)).clamp(0, 1)
    return x_adv


class ForViews(nn.Module):
    """The same model for a library that reshapes gradients by .view: it gets them contiguous."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.contiguous())
        logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits


def others(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, steps: int) -> dict[str, Call]:
    """The libraries of the `bench` extra, each with the same steps and step size."""
    import foolbox
    import torchattacks

    if norm == "L2":
        theirs = torchattacks.PGDL2(ForViews(model), eps=eps, alpha=eps / 10, steps=steps, random_start=False)
        attack = foolbox.attacks.L2PGD(rel_stepsize=0.1, steps=steps, random_start=False)
    else:
        theirs = torchattacks.PGD(ForViews(model), eps=eps, alpha=eps / 10, steps=steps, random_start=False)
        attack = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=steps, random_start=False)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=x.device)
    calls: dict[str, Call] = {
        "torchattacks": lambda: theirs(x.contiguous(), y),
        "foolbox": lambda: attack(wrapped, x, y, epsilons=eps)[1],
    }
    if norm == "L2":
        calls["cleverhans' formula"] = partial(cleverhans_formula, model, x, y, eps=eps, steps=steps)
    return calls


def robust_accuracy(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    with attacking(model), torch.no_grad():
        return (model(x_adv).argmax(1) == y).float().mean().item()


def measure(
    model: nn.Module, data: DataSplits, hardware: Hardware, rounds: int, *, samples: int, steps: int
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal) on a trained, undefended model; all start at the clean image."""
    split = subset(data.test, samples)
    x = to_unit(split.images.to(hardware.device), hardware.memory_format)
    y = split.labels.to(hardware.device)
    rows = []
    for norm, eps in (("L2", 1.0), ("Linf", 8 / 255)):
        generator = SampleGenerator.for_images(x, seed=0)
        plain = partial(
            pgd, model, x, y, generator=generator, norm=norm, eps=eps, steps=steps, random_start=False
        )
        candidates: dict[str, Call] = {
            "bare": partial(bare_loop, model, x, y, norm=norm, eps=eps, steps=steps),
            "aerl, all samples": partial(plain, drop_fooled=False),
            "aerl": plain,
            **others(model, x, y, norm, eps, steps),
        }
        seconds = time_in_turns(candidates, rounds)
        accuracy = {name: robust_accuracy(model, call(), y) for name, call in candidates.items()}
        what = f"PGD-{steps} {norm} eps {eps_text(eps)}, batch {samples}"
        overhead = ratio(seconds["aerl, all samples"], seconds["bare"])
        rows.append((f"{what}, no sample dropped: time over the bare loop", f"{overhead:.3f}", "<= 1.05"))
        for name in candidates:
            if name not in ("bare", "aerl, all samples", "aerl"):
                speed = ratio(seconds[name], seconds["aerl"])
                told = f"{speed:.1f} (robust: {accuracy['aerl']:.1%} against {accuracy[name]:.1%})"
                rows.append(
                    (f"{what}, undefended model: {name}'s time over aerl's", told, ">= 3, no higher accuracy")
                )
    return rows

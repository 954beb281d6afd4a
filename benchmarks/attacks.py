"""PGD and AutoAttack: aerl against a bare loop of forward and input gradient, and against other implementations."""

import copy
import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks import AutoAttack, BatchGenerator, attacking, pgd
from aerl.data import DataSplits, Split, subset, to_unit
from aerl.evaluation import evaluate
from aerl.evaluation.outcomes import Attacked
from aerl.runtime.device import Hardware
from aerl.runtime.terminal import eps_text
from benchmarks.paired import Timed, in_its_own_process, ratio, time_in_turns, timed

Attack = Callable[[Tensor, Tensor], Tensor]
THREATS: tuple[tuple[str, float], ...] = (("L2", 1.0), ("Linf", 8 / 255))
_AUTOATTACK_BATCH = 250  # the library's default, and aerl's


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
                delta = x_adv.detach() - x + eps / 10 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
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


# --- The libraries of the `bench` extra, each with the same steps and step size ---------------------------


def torchattacks(model: nn.Module, norm: str, eps: float, steps: int) -> Attack:
    import torchattacks

    make = torchattacks.PGDL2 if norm == "L2" else torchattacks.PGD
    attack = make(ForViews(model), eps=eps, alpha=eps / 10, steps=steps, random_start=False)
    return lambda x, y: attack(x.contiguous(), y)


def foolbox(model: nn.Module, norm: str, eps: float, steps: int) -> Attack:
    import foolbox

    make = foolbox.attacks.L2PGD if norm == "L2" else foolbox.attacks.LinfPGD
    attack = make(rel_stepsize=0.1, steps=steps, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    return lambda x, y: attack(wrapped, x, y, epsilons=eps)[1]


def art(model: nn.Module, norm: str, eps: float, steps: int) -> Attack:
    """The Adversarial Robustness Toolbox, whose images go in and out as NumPy arrays."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    device = next(model.parameters()).device

    def attack(x: Tensor, y: Tensor) -> Tensor:
        wrapped = PyTorchClassifier(
            model, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )  # fmt: skip
        search = ProjectedGradientDescent(
            wrapped, norm=2 if norm == "L2" else np.inf, eps=eps, eps_step=eps / 10, max_iter=steps,
            batch_size=len(x), num_random_init=0, verbose=False,
        )  # fmt: skip
        found = search.generate(x.contiguous().cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(found).to(device)

    return attack


LIBRARIES = {"torchattacks": torchattacks, "foolbox": foolbox, "art": art}


def missing() -> list[str]:
    """The libraries that are not installed."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


# --- Side by side -----------------------------------------------------------------------------------------


def robust_accuracy(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    with attacking(model), torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x_adv.split(256)]).eq(y).float().mean().item()


def measure(
    models: Mapping[str, nn.Module],
    data: DataSplits,
    hardware: Hardware,
    rounds: int,
    *,
    samples: int,
    steps: int,
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal) of PGD on the models by name; every attack starts at the clean image.

    All get the same batches: 512 images on a GPU and 128 on the CPU, as `aerl.evaluation.evaluate` does.
    """
    torch.backends.cudnn.benchmark = False  # as in `evaluate`: batches shrink as samples are fooled
    split = subset(data.test, samples)
    x = to_unit(split.images.to(hardware.device), hardware.memory_format)
    y = split.labels.to(hardware.device)
    size = min(samples, 512 if hardware.device.type == "cuda" else 128)
    rows = [(f"PGD by {name}", "left out: not installed, see the bench extra", "") for name in missing()]
    for who, model in models.items():
        for norm, eps in THREATS:
            rows += _pgd(model, x, y, size, rounds, who=who, norm=norm, eps=eps, steps=steps)
    return rows


def _pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    size: int,
    rounds: int,
    *,
    who: str,
    norm: str,
    eps: float,
    steps: int,
) -> list[tuple[str, str, str]]:
    ours = partial(
        pgd, model, generator=BatchGenerator(torch.Generator(), len(x)), norm=norm, eps=eps, steps=steps,
        random_start=False,
    )  # fmt: skip
    attacks: dict[str, Attack] = {
        "bare": partial(bare_loop, model, norm=norm, eps=eps, steps=steps),
        "aerl, all samples": partial(ours, drop_fooled=False),
        "aerl": ours,
    }
    absent = missing()
    attacks |= {name: make(model, norm, eps, steps) for name, make in LIBRARIES.items() if name not in absent}
    if norm == "L2":
        attacks["cleverhans' formula"] = partial(cleverhans_formula, model, eps=eps, steps=steps)

    def all_of(attack: Attack) -> Tensor:
        return torch.cat([attack(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)])

    candidates = {name: partial(all_of, attack) for name, attack in attacks.items()}
    accuracy = {name: robust_accuracy(model, call(), y) for name, call in candidates.items()}  # and warms up
    seconds = time_in_turns(candidates, rounds, warm_up=False)
    what = f"PGD-{steps} {norm} eps {eps_text(eps)}, {who} model, {len(x)} images, batch {size}"
    overhead = ratio(seconds["aerl, all samples"], seconds["bare"])
    rows = [(f"{what}, no sample dropped: time over the bare loop", f"{overhead:.3f}", "<= 1.05")]
    goal = ">= 5, no higher accuracy" if who == "undefended" else ">= 1.3, no higher accuracy"
    for name in list(candidates)[3:]:
        speed = ratio(seconds[name], seconds["aerl"])
        measured = f"{speed:.1f} (robust: {accuracy['aerl']:.1%} against {accuracy[name]:.1%})"
        rows.append((f"{what}: {name}'s time over aerl's", measured, goal))
    return rows


def users_autoattack(
    models: Mapping[str, nn.Module], split: Split, device: torch.device
) -> Callable[[str, str, float, int], Timed]:
    """pyautoattack by itself: contiguous models in eval mode on PyTorch's defaults, as its README shows it.

    The returned function (model, norm, eps, samples) returns the seconds, and which of the first samples are robust.
    """
    from pyautoattack import AutoAttack as Library

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    x, y = to_unit(split.images).to(device), split.labels.to(device)

    def attack(who: str, norm: str, eps: float, samples: int) -> Timed:
        model = models[who].to(device).eval()
        library = Library(model, device=device, eps=eps, norm=norm, seed=0, version="standard")
        run = partial(library.run_standard_evaluation, x[:samples], y[:samples], batch_size=_AUTOATTACK_BATCH)
        done = timed(run)
        with torch.no_grad():
            robust = model(done.result[0]).argmax(1) == y[:samples]
        return Timed(done.seconds, robust.cpu().numpy())

    return attack


def measure_autoattack(
    models: Mapping[str, nn.Module],
    data: DataSplits,
    hardware: Hardware,
    rounds: int,
    *,
    samples: Mapping[str, int],
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal) of AutoAttack standard, on so many `samples` for each model by name.

    Both with the same seed and batches, so that the same samples should withstand them.
    """
    torch.backends.cudnn.benchmark = False
    chosen = subset(data.test, max(samples.values()))
    plain = {
        name: copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for name, model in models.items()
    }
    rows = []
    with in_its_own_process(users_autoattack, plain, chosen, hardware.device) as theirs:
        for who, model in models.items():
            theirs(who, "L2", 100.0, 2)  # nothing withstands it; by then all is loaded
            split = Split(chosen.images[: samples[who]], chosen.labels[: samples[who]])
            for norm, eps in THREATS:
                rows.append(_autoattack(model, split, hardware, rounds, theirs, who=who, norm=norm, eps=eps))
    return rows


def _autoattack(
    model: nn.Module, split: Split, hardware: Hardware, rounds: int, theirs: Callable[..., Timed], *, who: str,
    norm: str, eps: float,
) -> tuple[str, str, str]:  # fmt: skip
    masks: dict[str, np.ndarray] = {}
    attack = AutoAttack(norm=norm, eps=eps, batch_size=_AUTOATTACK_BATCH)  # type: ignore[arg-type]

    def aerl() -> Timed:
        """Including the clean predictions, which the library makes, too."""

        def attacked() -> Attacked:
            clean = evaluate.predict(model, split, hardware, _AUTOATTACK_BATCH)
            return evaluate.run_attack(
                attack, model, split, clean, hardware, name="autoattack", seed=0, batch_size=_AUTOATTACK_BATCH
            )["autoattack"]

        done = timed(attacked)
        masks["aerl"] = done.result.pred == split.labels.numpy()
        return Timed(done.seconds)

    def library() -> Timed:
        done = theirs(who, norm, eps, len(split))
        masks["library"] = done.result
        return Timed(done.seconds)

    seconds = time_in_turns({"aerl": aerl, "library": library}, rounds, warm_up=False)
    differ = int((masks["aerl"] != masks["library"]).sum())
    same = "the same samples" if differ == 0 else f"{differ} of {len(split)} samples differ"
    accuracies = f"robust: {masks['aerl'].mean():.1%} against {masks['library'].mean():.1%}, {same}"
    what = f"AutoAttack standard {norm} eps {eps_text(eps)}, {who} model, {len(split)} images"
    speed = ratio(seconds["library"], seconds["aerl"])
    return f"{what}: pyautoattack's own time over aerl's", f"{speed:.2f} ({accuracies})", ">= 1.3, the same samples"

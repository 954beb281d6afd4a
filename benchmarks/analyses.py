"""Analyses: the landscape against one point at a time, what gradient statistics add to PGD, and all of them at once."""

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.analyses import AnalysisContext
from aerl.analyses.curvature import Curvature
from aerl.analyses.curve import Curve
from aerl.analyses.gradients import Dynamics, Gradients
from aerl.analyses.landscape import Landscape, plane
from aerl.analyses.masking import masking
from aerl.analyses.outcomes import confusion, entropy, norms
from aerl.analyses.pictures import pictures
from aerl.attacks import SampleGenerator, pgd
from aerl.data import DataSplits, Split, prepare, subset, to_unit
from aerl.data.sources import digits
from aerl.evaluation import evaluate
from aerl.models import AliCNN, Classifier
from aerl.runtime.device import Hardware
from aerl.tracking.results import ResultLog
from aerl.training.loop import Recipe, fit
from aerl.training.objectives import Labels, policy_gradient
from benchmarks.paired import ratio, time_in_turns


def measure(
    model: nn.Module, data: DataSplits, hardware: Hardware, rounds: int, scratch: Path, smoke: bool
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal); `model` is undefended, on images of `data`."""
    model.eval()
    x = to_unit(data.test.images[:128].to(hardware.device), hardware.memory_format)
    y = data.test.labels[:128].to(hardware.device)
    return [
        _landscape(model, x[0], y[0], rounds, resolution=61 if smoke else 101),
        _statistics(model, x, y, rounds, steps=3 if smoke else 20),
        _everything(hardware, scratch, samples=100 if smoke else 1_000),
    ]


def point_by_point(model: nn.Module, x: Tensor, y: Tensor, points: int, total: int) -> None:
    """The paper's way of drawing a landscape: for each point a batch of one, its loss and its class."""
    first, second = torch.randn_like(x), torch.randn_like(x)
    with torch.no_grad():
        for number in range(points):
            a, b = 6 * number / total - 3, 3 - 6 * number / total
            logits = model((x + a * first + b * second)[None])
            F.cross_entropy(logits, y[None]).item()
            logits.argmax(1).item()


def _landscape(model: nn.Module, x: Tensor, y: Tensor, rounds: int, resolution: int) -> tuple[str, str, str]:
    total = resolution**2
    points = min(2_000, total)  # of the loop, whose points all cost the same
    seconds = time_in_turns(
        {
            "loop": lambda: point_by_point(model, x, y, points, total),
            "ours": lambda: plane(model, x, y, norm="L2", eps=1.0, resolution=resolution),
        },
        rounds,
    )
    whole = [second * total / points for second in seconds["loop"]]
    what = f"landscape, {resolution}x{resolution} points: one point at a time ({points} of them) over aerl's"
    return what, f"{ratio(whole, seconds['ours']):.1f}", "> 1"


def _statistics(model: nn.Module, x: Tensor, y: Tensor, rounds: int, steps: int) -> tuple[str, str, str]:
    dynamics = Dynamics.empty(len(x), steps, x[0].numel(), x.device)
    rows = torch.arange(len(x), device=x.device)

    def attack(**options: object) -> Tensor:
        noise = SampleGenerator.for_images(x, 0)
        return pgd(model, x, y, generator=noise, eps=1.0, steps=steps, loss="ce", drop_fooled=False, keep="last",
                   **options)  # type: ignore[arg-type]  # fmt: skip

    seconds = time_in_turns({"plain": attack, "observed": lambda: attack(observe=dynamics.observer(rows))}, rounds)
    what = f"gradient statistics, PGD-{steps}, batch {len(x)}: time over PGD's without them"
    return what, f"{ratio(seconds['observed'], seconds['plain']):.3f}", "<= 1.1"


def _everything(hardware: Hardware, scratch: Path, samples: int) -> tuple[str, str, str]:
    """The analyses that every run makes, on an AliCNN of digits and on `samples` images of its training set."""
    data = prepare(
        digits, identity={}, data_dir=scratch, name="digits", size=None, channels=None, val_fraction=0.1,
        split_seed=42,
    )  # fmt: skip
    torch.manual_seed(0)
    net = AliCNN(num_classes=10, channels=1, size=(8, 8))
    model = hardware.place(Classifier(net, data.mean, data.std))
    objective = partial(policy_gradient, act=Labels(), weight=0.0, probability_floor=0.0)
    recipe = Recipe(epochs=5, batch_size=64, optimizer=partial(torch.optim.AdamW, lr=1e-3), objective=objective)
    identity = {"run_id": "digits", "seed": 0, "dataset": "digits", "model": "alicnn", "trainer": "sl"}
    folder = scratch / "everything"
    folder.mkdir()
    log = ResultLog(folder, identity)
    fit(model, data, recipe, hardware, seed=0, folder=scratch / "digits_net", results=log)
    chosen: Split = subset(data.train, samples)
    clean = evaluate.predict(model, chosen, hardware, 128)
    attack = partial(pgd, norm="L2", eps=1.0)
    found = evaluate.run_attack(attack, model, chosen, clean, hardware, name="pgd", seed=0, batch_size=128)["pgd"]
    outcomes = {"label": chosen.labels.numpy()}
    outcomes |= clean.columns("clean")
    outcomes |= found.columns("pgd")
    context = AnalysisContext(
        model=model, images=chosen.images, labels=chosen.labels, class_names=data.class_names, outcomes=outcomes,
        adversarial={"pgd": torch.from_numpy(found.examples)}, attacks={"pgd": {"norm": "L2", "eps": 1.0}},
        figures=folder / "figures", log=log, norm="L2", eps=1.0, seed=0, trainer="sl", hardware=hardware,
        batch_size=128, save=lambda **news: None,
    )  # fmt: skip
    began = time.perf_counter()
    for analysis in (pictures, masking, entropy, confusion, norms):
        analysis(context)
    Curve(load=lambda runs, key: {}, samples=samples)(context)
    Curvature(load=lambda runs, key: {}, samples=samples)(context)
    Gradients(samples=samples, load=lambda runs, key: {})(context)
    Landscape(load=lambda runs, key: {})(context)
    seconds = time.perf_counter() - began
    return f"analysis=standard, {samples} samples of digits", f"{seconds:.0f} s", "< 30 s on two cores"

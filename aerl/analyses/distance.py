"""How far the nearest adversarial example of each image is: accuracy at every eps from one attack."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator

from aerl.analyses.context import AnalysisContext, NotMade
from aerl.attacks import SampleGenerator, fmn, predictions
from aerl.attacks.modes import attacking
from aerl.config.compose import run_names
from aerl.data import Split, subset
from aerl.errors import UserError
from aerl.evaluation import evaluate
from aerl.evaluation.statistics import right
from aerl.report import figures
from aerl.runtime.progress import progress
from aerl.tracking.results import read_config, read_summary, trainer_of
from aerl.types import ORDERS, Count


def _measured(run: str) -> str:
    """Checks a run when the configuration is read."""
    if not (Path(run).expanduser() / "tables/distance.csv").is_file():
        raise ValueError("must be a run with analysis=distance; it has no tables/distance.csv")
    return run


Measured = Annotated[str, AfterValidator(_measured)]


def distance(
    context: AnalysisContext, *, runs: Sequence[Measured] = (), samples: Count = 500, steps: Count = 100
) -> None:
    """Find the smallest adversarial perturbation of `samples` test images, always the same ones.

    FMN (Pintor et al. 2021) with straight-through gradients searches it. What it finds is an upper bound, and so is the
    perturbation by any attack of the run that counts, in the run's norm, if it fooled the image. The smallest counts.
    Images that are wrong when clean have distance 0. An image broken at some distance is broken at every larger eps, so
    the accuracy at every eps is read from the distances: one curve, with a band that holds for all eps together with
    95 % confidence (Dvoretzky-Kiefer-Wolfowitz, with the constant of Massart 1990).

    `runs` are other runs to show beside this one, from their own tables.

    Writes figures/distance.png, tables/distance.csv (`row` in outcomes.npz, `distance`, and the `attack` that found it)
    and `distance` in summary.json: n, `median` and `mean` distance (the area under the curve; images without any
    adversarial example count with the largest distance found), `found` (the share), `band`, and accuracies by eps.
    """
    rows = subset(Split(torch.arange(len(context.labels)), context.labels), samples).images
    n, norm = len(rows), context.norm
    split = Split(context.images[rows], context.labels[rows])
    clean = right(context.outcomes)[rows.numpy()]
    if not clean.any():
        raise NotMade("no sample is classified correctly")
    if norm == "L1":
        raise NotMade("FMN is implemented for L2 and Linf only")
    found = np.where(clean, np.inf, 0.0)
    by = np.where(clean, "", "clean").astype("<U100")
    with progress("distance", int(clean.sum()), "images") as bar:
        for part in torch.split(torch.from_numpy(np.flatnonzero(clean)), context.batch_size):
            x, y = evaluate.batch(split, part, context.hardware)
            noise = SampleGenerator.for_images(x, context.seed, "distance")
            x_adv = fmn(context.model, x, y, generator=noise, norm=norm, steps=steps, gradient="straight_through")
            with attacking(context.model), torch.no_grad():
                fooled = (predictions(context.model(x_adv)) != y).cpu().numpy()
            sizes = (x_adv - x).flatten(1).norm(dim=1, p=ORDERS[norm]).cpu().numpy()
            found[part[fooled].numpy()], by[part[fooled].numpy()] = sizes[fooled], "fmn"
            bar.update(len(part))
    for name, info in context.attacks.items():
        if info["counts"] and info["norm"] == norm:
            fooled = context.outcomes[f"{name}_pred"][rows.numpy()] != split.labels.numpy()
            size = context.outcomes[f"{name}_{norm.lower()}"][rows.numpy()]
            closer = fooled & clean & (size < found)
            found[closer], by[closer] = size[closer], name
    band = half_width(n)
    largest = found[np.isfinite(found)].max(initial=0.0)
    marks = [scale * context.eps for scale in (0.25, 0.5, 1, 1.5, 2)]
    accuracies = {f"{eps:g}": curve(found, eps) for eps in marks}
    report: dict[str, Any] = {
        "n": n, "median": float(np.median(found)), "mean": float(np.minimum(found, largest).mean()),
        "found": float(np.isfinite(found).mean()), "band": band, "accuracy": accuracies,
    }  # fmt: skip
    context.save(distance=report)
    context.table("distance", ["row", "distance", "attack"], list(zip(rows.tolist(), found.tolist(), by, strict=True)))
    others = {name: _read(Path(run).expanduser(), norm) for name, run in zip(run_names(runs), runs, strict=True)}
    context.draw("distance", _draw(context, found, others), f"accuracy at every {norm} eps, n = {n}, with a 95 % band")
    values = {"median_distance": report["median"], "mean_distance": report["mean"]}
    context.log.log(values, n=n, split="test", attack="distance", norm=norm, eps=context.eps)


def _read(folder: Path, norm: str) -> tuple[str, np.ndarray]:
    """The trainer of a run and its distances."""
    if (theirs := read_config(folder)["norm"]) != norm:
        raise UserError(f"runs={folder}: was judged under {theirs}, this run under {norm}")
    summary = read_summary(folder) or {}
    with (folder / "tables/distance.csv").open(newline="") as file:
        found = np.array([float(row["distance"]) for row in csv.DictReader(file)])
    return trainer_of(summary), found


def half_width(n: int, confidence: float = 0.95) -> float:
    """Of the band around an empirical distribution of n samples: sqrt(ln(2 / (1 - confidence)) / 2n)."""
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))


def curve(distances: np.ndarray, eps: float) -> float:
    """The accuracy at eps: the share of distances (n,) beyond it."""
    return float((distances > eps).mean())


def _draw(context: AnalysisContext, found: np.ndarray, others: Mapping[str, tuple[str, np.ndarray]]) -> Any:
    figure, ((axes,),) = figures.subplots(figsize=(6.4, 4.2))
    top = max(2 * context.eps, float(np.quantile(found[np.isfinite(found)], 0.98)))
    own = context.this_run if others else "smallest perturbation found"
    for number, (name, (trainer, distances)) in enumerate({own: (context.trainer, found), **others}.items()):
        eps = np.concatenate([[0.0], np.sort(distances[np.isfinite(distances) & (distances > 0)]), [top]])
        accuracy, band = np.array([curve(distances, each) for each in eps]), half_width(len(distances))
        colour, line = figures.trainer_colour(trainer), ("-", "--", ":", "-.")[number % 4]
        axes.fill_between(eps, np.clip(accuracy - band, 0, 1), np.clip(accuracy + band, 0, 1), step="post", alpha=0.2,
                          color=colour, linewidth=0)  # fmt: skip
        axes.step(eps, accuracy, line, where="post", color=colour, label=name)
    within = [info for info in context.attacks.values() if info["counts"] and info["norm"] == context.norm]
    points = [(info["eps"], info["robust_accuracy"]["value"]) for info in within]
    if points:
        axes.plot(*zip(*points, strict=True), ".", color="black", markersize=4, label="attacks of the run")
    axes.axvline(context.eps, color="grey", linestyle=":", linewidth=1)
    axes.set(xlim=(0, top), ylim=(0, 1), xlabel=f"{context.norm} eps", ylabel="accuracy")
    axes.legend(fontsize=8)
    axes.set_title(f"Accuracy at every eps, n = {len(found)}, with a 95 % band", fontsize=10)
    return figure

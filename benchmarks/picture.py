"""The picture of the README: `python -m benchmarks.picture RUN... --out FILE.png`.

Accuracy against eps of finished runs, under the paper's attack and under everything that aerl has. The second curve is
that of `analysis=distance`, so that RUN needs it; the first attacks the same images at each eps.

    for trainer in sl rl pgd_at; do python launch.py dataset=cifar10_small trainer=$trainer eps=0.5 \\
        evaluation.samples=500 analysis=distance analysis.distance.samples=500 name=$trainer; done
    python -m benchmarks.picture runs/sl runs/rl runs/pgd_at --out docs/images/accuracy.png
"""

import argparse
import csv
from functools import partial
from pathlib import Path

import numpy as np

import aerl
from aerl.build import build_data
from aerl.config.schema import Config
from aerl.data import subset, to_unit
from aerl.report import figures
from aerl.tracking.results import read_config


def curves(run: Path, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracies at eps = `scales` (m,) times the run's under the paper's attack, and at all eps (2, n) under all."""
    config = Config.model_validate(read_config(run))
    test = subset(build_data(config).test, config.evaluation.samples)
    images, model = to_unit(test.images), aerl.load_model(run)
    attack = partial(aerl.attacks.PaperPGD, norm=config.norm)
    paper = []
    for eps in scales * config.eps:
        found = aerl.evaluate(
            model, images, test.labels, norm=config.norm, eps=eps, attacks=[attack(eps=eps)], analyses=()
        )
        paper.append((found.attacks or {"": found.clean}).popitem()[1].value)
    with (run / "tables/distance.csv").open() as file:
        distances = np.sort([float(row["distance"]) for row in csv.DictReader(file)])
    beyond = 1 - np.arange(1, len(distances) + 1) / len(distances)
    return {"paper": np.array(paper), "all": np.array([distances, beyond]), "eps": scales * config.eps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    scales = np.array([0, 0.125, 0.25, 0.5, 0.75, 1, 1.5, 2])
    figure, axes = figures.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for run in given.runs:
        summary = aerl.Report(run).summary
        found, trainer = curves(run, scales), summary["trainer"]
        colour = figures.trainer_colour(trainer)
        axes[0, 0].plot(found["eps"], 100 * found["paper"], "o-", color=colour, label=trainer, markersize=4)
        axes[0, 1].step(found["all"][0], 100 * found["all"][1], where="post", color=colour, label=trainer)
        at = [
            float(100 * np.interp(1.0, scales, found["paper"])),
            100 * float((found["all"][0] > found["eps"][5]).mean()),
        ]
        print(f"{trainer}: at the run's eps {at[0]:.1f} % under the paper's attack, {at[1]:.1f} % under all")
    n, norm = summary["clean_accuracy"]["n"], aerl.load_runs(given.runs[0])["norm"][0]
    for axis, title in zip(axes[0], ("what the paper's attack reports", "what aerl finds"), strict=True):
        axis.axvline(found["eps"][5], color="grey", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel=f"{norm} eps", xlim=(0, found["eps"][-1]), ylim=(0, 80))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"accuracy, % of {n} images")
    axes[0, 1].legend(frameon=False)
    path = figures.save(figure, given.out.parent, given.out.stem, f"{norm}, {n} images")
    path.with_suffix(".pdf").unlink()


if __name__ == "__main__":
    main()

"""Analyses that read only the outcomes, without running a model: entropy, confusion, sizes of perturbations."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from aerl.analyses.context import AnalysisContext, NotMade, class_name
from aerl.report import figures
from aerl.report.figures import BLUE, GREEN, ORANGE, PURPLE, RIGHT, SKY, VERMILION, WRONG
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result

log = logging.getLogger("aerl")

_ATTACK_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
_FEWEST = 10  # samples of a curve
_READABLE = 20  # a confusion matrix with more classes has no labels

Groups = dict[tuple[str, str], dict[str, np.ndarray]]


def entropy(context: AnalysisContext) -> list[Result]:
    """Predictive entropy (bits) and confidence (the softmax's maximum) of right and of wrong answers.

    On the clean images and on those that each attack returned, fooled or not. Writes figures/entropy.png,
    tables/entropy.csv and a Result of each mean.
    """
    groups: Groups = {}
    rows, results = [], []
    for images in ("clean", *context.attacks):
        pred = context.outcomes[f"{images}_pred"].astype(int)
        right = pred == context.outcomes["label"]
        if count := int((pred < 0).sum()):  # wrong, but without entropy and confidence
            log.warning("entropy: %s: %d predictions are not finite and left out", images, count)
        for answer, mask in (("right", right), ("wrong", ~right & (pred >= 0))):
            values = {key: context.outcomes[f"{images}_{key}"][mask].astype(float) for key in ("entropy", "confidence")}
            groups[images, answer] = values
            n, statistics = int(mask.sum()), []
            for value in values.values():
                statistics += [value.mean() if n else np.nan, value.std(ddof=1) if n > 1 else np.nan]
            rows.append([images, answer, n, *map(float, statistics)])
            if n:
                means = {f"{key}_{answer}": float(value.mean()) for key, value in values.items()}
                results += context.log.log(means, n=n, split="test", attack="none" if images == "clean" else images)
    columns = ("images", "answer", "n", "entropy_mean", "entropy_sd", "confidence_mean", "confidence_sd")
    context.table("entropy", columns, rows)
    context.draw("entropy", _draw_entropy(groups), "and confidence of the predictions, right and wrong answers")
    return results


def _draw_entropy(groups: Groups) -> Any:
    """A row for each attack, but for those that changed nothing: an attack may get the survivors of others only."""
    images: list[str] = []
    for name in dict.fromkeys(name for name, _ in groups):
        if not images or not all(_equal(groups[name, key], groups[images[-1], key]) for key in ("right", "wrong")):
            images.append(name)
    figure, axes = figures.subplots(len(images), 2, figsize=(9, 1.2 + 1.5 * len(images)))
    highest = max(values["entropy"].max(initial=0) for values in groups.values()) or 1.0
    for row, name in enumerate(images):
        n = max(sum(len(groups[name, answer]["entropy"]) for answer in ("right", "wrong")), 1)
        for axis, key, top in zip(axes[row], ("entropy", "confidence"), (highest, 1.0), strict=True):
            for answer, colour in (("right", RIGHT), ("wrong", WRONG)):
                values = groups[name, answer][key]
                axis.hist(
                    values, bins=np.linspace(0, top, 31), weights=np.full(len(values), 100 / n), histtype="stepfilled",
                    alpha=0.55, color=colour, edgecolor=colour, label=f"{answer}, n = {len(values)}",
                )  # fmt: skip
            axis.set(xlim=(0, top), ylim=(0, max(axis.get_ylim()[1], 1.1)), ylabel="% of samples")
        axes[row, 0].set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes[row, 0].legend(frameon=False, fontsize=9)
    axes[-1, 0].set_xlabel("entropy of the prediction, bits")
    axes[-1, 1].set_xlabel("confidence, the largest probability")
    return figure


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(values, other[key]) for key, values in one.items())


def confusion(context: AnalysisContext) -> list[Result]:
    """Which class is confused with which: on the clean images, and on those of the first attack that fools a sample.

    Only attacks within the run's threat model take part. Writes figures/confusion.png and tables/confusion.csv (a line
    for each pair of classes that occurs). A prediction may also be no class (logits not finite) or one that the dataset
    does not have.
    """
    label, names = context.outcomes["label"], context.class_names
    counted = [name for name, info in context.attacks.items() if info.get("counts", True)]
    after = context.outcomes["clean_pred"].copy()
    for name in counted:
        after = np.where(after == label, context.outcomes[f"{name}_pred"], after)
    predicted = {"clean": context.outcomes["clean_pred"]} | ({"under attack": after} if counted else {})
    rows = [
        [images, class_name(names, true), class_name(names, guess), count]
        for images, pred in predicted.items()
        for (true, guess), count in sorted(Counter(zip(label.tolist(), pred.tolist(), strict=True)).items())
    ]
    context.table("confusion", ("images", "true", "predicted", "n"), rows)
    caption = f"which class becomes which, clean and under {', '.join(counted) or 'no attack'}"
    context.draw("confusion", _draw_confusion(label, predicted, names), caption)
    return []


def _draw_confusion(label: np.ndarray, predicted: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Any:
    k = len(names)
    side = 1.8 + (0.38 * k if k <= _READABLE else 5)
    figure, axes = figures.subplots(1, len(predicted), figsize=(side * len(predicted) + 1, side))
    for axis, (title, pred) in zip(axes[0], predicted.items(), strict=True):
        # One more column for predictions that are none of the k classes, if there are any.
        counts = np.zeros((k, k + bool(((pred < 0) | (pred >= k)).any())), int)
        np.add.at(counts, (label, np.where(pred < 0, k, np.minimum(pred, k))), 1)
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        short = [name[:14] for name in (*names, "none of these")] if k <= _READABLE else []

        def text(row: int, column: int, share: np.ndarray = share) -> str:
            return f"{share[row, column]:.0f}" if share[row, column] >= 0.5 else ""

        image = figures.heatmap(axis, share, short[:k], short[: counts.shape[1]], text, rotation=60)
        axis.set(title=title, xlabel="predicted class", ylabel="true class", aspect="equal")
    figure.colorbar(image, ax=axes, label="% of the true class")
    return figure


def norms(context: AnalysisContext) -> list[Result]:
    """How far the adversarial examples are from their images, in L2 and in Linf, by attack.

    Of the samples that were right and that the attack fooled; an attack on the survivors of others has only those that
    it fooled itself. Writes figures/norms.png (the share of them within a distance, for attacks that fooled 10 samples
    or more), tables/norms.csv with the median and the quartiles, and a Result of each median. NotMade if no attack
    fooled a sample.
    """
    sizes = {}
    for name in context.attacks:
        fooled = context.attacked(name) & (context.outcomes[f"{name}_pred"] != context.outcomes["label"])
        if fooled.any():
            sizes[name] = {key: context.outcomes[f"{name}_{key}"][fooled].astype(float) for key in ("l2", "linf")}
    if not sizes:
        raise NotMade("no attack fooled a sample")
    rows, results = [], []
    for name, both in sizes.items():
        medians = {f"median_{key}": float(np.median(values)) for key, values in both.items()}
        results += context.log.log(medians, n=len(both["l2"]), split="test", attack=name)
        for key, values in both.items():
            rows.append([name, key, len(values), *np.quantile(values, (0.25, 0.5, 0.75)).tolist()])
    context.table("norms", ("attack", "norm", "n", "quartile_1", "median", "quartile_3"), rows)
    drawn = {name: both for name, both in sizes.items() if len(both["l2"]) >= _FEWEST}
    if drawn:
        left_out = ", ".join(f"{name} ({len(sizes[name]['l2'])})" for name in sizes.keys() - drawn.keys())
        caption = "sizes of the adversarial perturbations" + (f"; too few to draw: {left_out}" if left_out else "")
        context.draw("norms", _draw_norms(drawn, context.norm, context.eps), caption)
    return results


def _draw_norms(sizes: Mapping[str, Mapping[str, np.ndarray]], norm: str, eps: float) -> Any:
    from matplotlib.ticker import PercentFormatter

    figure, axes = figures.subplots(1, 2, figsize=(9, 3.6))
    for axis, title in zip(axes[0], ("L2", "Linf"), strict=True):
        for number, (name, both) in enumerate(sizes.items()):
            values = both[title.lower()]
            colour = _ATTACK_COLOURS[number % len(_ATTACK_COLOURS)]
            style = "-" if number < len(_ATTACK_COLOURS) else "--"
            axis.ecdf(values, color=colour, linestyle=style, label=f"{name}, n = {len(values)}")
        if title == norm:
            axis.axvline(eps, color="black", linestyle=":", label=f"the run's eps, {eps_text(eps)}")
        axis.set(xlabel=f"{title} norm of the perturbation, pixels in [0, 1]", ylabel="fooled samples within this size")
        widest = max(*(both[title.lower()].max() for both in sizes.values()), eps if title == norm else 0.0)
        axis.set(xlim=(0, 1.05 * widest), ylim=(0, 1.01))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return figure

"""What the outcomes of the attacks look like: confidence and entropy, confusion, sizes of perturbations.

All of it is read from the outcomes: no model is run.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from aerl.analyses import AnalysisContext, NotMade, class_name
from aerl.report.figures import BLUE, GREEN, ORANGE, PURPLE, RIGHT, SKY, VERMILION, WRONG
from aerl.tracking.results import Result
from aerl.types import eps_text

log = logging.getLogger("aerl")

_COLUMNS = ("images", "answer", "n", "entropy_mean", "entropy_sd", "confidence_mean", "confidence_sd")
_ATTACK_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
_READABLE = 20  # classes of a confusion matrix whose cells can be labelled

Groups = dict[tuple[str, str], dict[str, np.ndarray]]


def entropy(context: AnalysisContext) -> list[Result]:
    """Predictive entropy (bits) and confidence (the softmax's maximum) of right and of wrong answers.

    On the clean images and on those that each attack has left; a sample that an attack did not fool counts with
    what the attack returned for it. A masked model is often one that is certain of everything. Writes
    figures/entropy.png, tables/entropy.csv and a Result of each mean.
    """
    groups: Groups = {}
    for images in ("clean", *context.attacks):
        values = {key: context.outcomes[f"{images}_{key}"] for key in ("entropy", "confidence")}
        pred = context.outcomes[f"{images}_pred"].astype(int)
        right = pred == context.outcomes["label"]
        if count := int((pred < 0).sum()):  # which are wrong, but have neither entropy nor confidence
            log.warning("entropy: %s: %d predictions are not finite and left out", images, count)
        for answer, mask in (("right", right), ("wrong", ~right & (pred >= 0))):
            groups[images, answer] = {key: value[mask].astype(float) for key, value in values.items()}
    rows = [
        [
            *group,
            len(values["entropy"]),
            *(f(values[key]) for key in ("entropy", "confidence") for f in (_mean, _sd)),
        ]
        for group, values in groups.items()
    ]
    context.table("entropy", _COLUMNS, rows)
    context.draw("entropy", _draw_entropy(groups), "and confidence of the predictions, right and wrong answers")
    results = []
    for (images, answer), values in groups.items():
        if n := len(values["entropy"]):
            means = {f"{key}_{answer}": _mean(value) for key, value in values.items()}
            results += context.log.log(means, n=n, split="test", attack="none" if images == "clean" else images)
    return results


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _draw_entropy(groups: Groups) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    images = list(dict.fromkeys(name for name, _ in groups))
    figure = Figure(figsize=(9, 1.2 + 1.5 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False)
    highest = max((values["entropy"].max(initial=0) for values in groups.values()), default=0) or 1.0
    for row, name in enumerate(images):
        for axis, key, top in zip(axes[row], ("entropy", "confidence"), (highest, 1.0), strict=True):
            shares = []
            for answer, colour in (("right", RIGHT), ("wrong", WRONG)):
                values = groups[name, answer][key]
                total = sum(len(groups[name, other][key]) for other in ("right", "wrong"))
                weights = np.full(len(values), 100 / max(total, 1))
                counts, _, _ = axis.hist(
                    values, bins=np.linspace(0, top, 31), weights=weights, histtype="stepfilled", alpha=0.55,
                    color=colour, edgecolor=colour, label=f"{answer}, n = {len(values)}",
                )  # fmt: skip
                shares.append(np.max(counts, initial=0))
            axis.set(xlim=(0, top), ylim=(0, max(*shares, 1) * 1.1))
            axis.set_ylabel("% of samples")
            if key == "entropy":
                axis.set_title(name, loc="left", fontsize=11, fontweight="bold")
                axis.legend(frameon=False, fontsize=9)
    axes[-1, 0].set_xlabel("entropy of the prediction, bits")
    axes[-1, 1].set_xlabel("confidence, the largest probability")
    return figure


def confusion(context: AnalysisContext) -> list[Result]:
    """Which class becomes which: on the clean images, and as the first attack that fools a sample leaves it.

    Only attacks within the run's threat model take part. Writes figures/confusion.png and tables/confusion.csv (a line
    for each pair of classes that occurs); measures nothing new, so the list of Results is empty. What is predicted may
    also be no class, where the logits are not finite, or one that the dataset does not have.
    """
    label = context.outcomes["label"]
    counted = [name for name, told in context.attacks.items() if told.get("counts", True)]
    after = context.outcomes["clean_pred"].copy()
    for name in counted:
        standing = after == label
        after[standing] = context.outcomes[f"{name}_pred"][standing]
    predicted = {"clean": context.outcomes["clean_pred"]} | ({"under attack": after} if counted else {})
    names = context.class_names
    rows = [
        [images, class_name(names, true), class_name(names, said), count]
        for images, pred in predicted.items()
        for (true, said), count in sorted(Counter(zip(label.tolist(), pred.tolist(), strict=True)).items())
    ]
    context.table("confusion", ("images", "true", "predicted", "n"), rows)
    caption = f"which class becomes which, clean and under {', '.join(counted) or 'no attack'}"
    matrices = {images: _confusion(label, pred, len(names)) for images, pred in predicted.items()}
    context.draw("confusion", _draw_confusion(matrices, names), caption)
    return []


def _confusion(label: np.ndarray, pred: np.ndarray, k: int) -> np.ndarray:
    """(k, k), with one more column for predictions that are none of the k classes, if there are any."""
    columns = k + bool(((pred < 0) | (pred >= k)).any())
    counts = np.zeros((k, columns), int)
    np.add.at(counts, (label, np.where(pred < 0, k, np.minimum(pred, k))), 1)
    return counts


def _draw_confusion(matrices: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Any:
    from matplotlib.figure import Figure

    k = len(names)
    side = 1.8 + (0.38 * k if k <= _READABLE else 5)
    figure = Figure(figsize=(side * len(matrices) + 1, side), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        image = axis.imshow(share, cmap="cividis", vmin=0, vmax=100)
        axis.set(title=title, xlabel="predicted class", ylabel="true class")
        if k <= _READABLE:
            said = [name[:14] for name in (*names, "none of these")[: matrix.shape[1]]]
            axis.set_xticks(range(len(said)), said, rotation=60, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(k), [name[:14] for name in names])
            for (row, column), value in np.ndenumerate(share):
                if value >= 0.5:
                    colour = "white" if value < 50 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, label="% of the true class")
    return figure


def norms(context: AnalysisContext) -> list[Result]:
    """How far the adversarial examples lie from their images, in L2 and in Linf, attack by attack.

    Of the samples that were right and that the attack fooled, which are new ones where it got only the survivors of
    earlier attacks. Writes figures/norms.png (the share of them
    within a distance), tables/norms.csv with the median and the quartiles, and a Result of each median. NotMade if no
    attack fooled a sample.
    """
    sizes = {}
    for name in context.attacks:
        fooled = context.attacked(name) & (context.outcomes[f"{name}_pred"] != context.outcomes["label"])
        if fooled.any():
            sizes[name] = {key: context.outcomes[f"{name}_{key}"][fooled].astype(float) for key in ("l2", "linf")}
    if not sizes:
        raise NotMade("no attack fooled a sample")
    rows = [
        [name, key, len(values), *(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))]
        for name, both in sizes.items()
        for key, values in both.items()
    ]
    context.table("norms", ("attack", "norm", "n", "quartile_1", "median", "quartile_3"), rows)
    context.draw("norms", _draw_norms(sizes, context.norm, context.eps), "sizes of the adversarial perturbations")
    results = []
    for name, both in sizes.items():
        medians = {f"median_{key}": float(np.median(values)) for key, values in both.items()}
        results += context.log.log(medians, n=len(both["l2"]), split="test", attack=name)
    return results


def _draw_norms(sizes: Mapping[str, Mapping[str, np.ndarray]], norm: str, eps: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(figure.subplots(1, 2), ("l2", "linf"), ("L2", "Linf"), strict=True):
        for number, (name, both) in enumerate(sizes.items()):
            values = np.sort(both[key])
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            colour = _ATTACK_COLOURS[number % len(_ATTACK_COLOURS)]
            style = "-" if number < len(_ATTACK_COLOURS) else "--"
            axis.step(values, share, style, where="post", color=colour, label=f"{name}, n = {len(values)}")
        if title == norm:
            axis.axvline(eps, color="black", linestyle=":", label=f"the run's eps, {eps_text(eps)}")
        widest = max(*(both[key].max() for both in sizes.values()), eps if title == norm else 0.0)
        axis.set(
            xlim=(0, 1.05 * widest),
            ylim=(0, 101),
            xlabel=f"{title} norm of the perturbation, pixels in [0, 1]",
        )
        axis.set_ylabel("% of the fooled samples within")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return figure

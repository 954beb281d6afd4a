"""Analyses that read only the outcomes, without running a model: entropy, confusion, sizes of perturbations."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aerl.analyses.context import AnalysisContext, NotMade, class_name
from aerl.analyses.others import FinishedRun, beside, tabulate
from aerl.report import figures
from aerl.report.figures import BLUE, GREEN, ORANGE, PURPLE, RIGHT, SKY, VERMILION, WRONG
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result

log = logging.getLogger("aerl")

_ATTACK_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
_FEWEST = 10  # samples of a curve
_READABLE = 20  # a confusion matrix with more classes has no labels

Groups = dict[tuple[str, str], dict[str, np.ndarray]]


def entropy(context: AnalysisContext, *, runs: Sequence[FinishedRun] = ()) -> list[Result]:
    """Predictive entropy (bits) and confidence (the softmax's maximum) of right and of wrong answers.

    On the clean images and on those that each attack returned, fooled or not. `runs` are other finished runs on the
    same samples to show beside this one. Writes figures/entropy.png, tables/entropy.csv and, of this run, a Result of
    each mean.
    """
    shown = {name: _answers(its) for name, its in beside(context, runs).items()}
    results: list[Result] = []
    for (images, answer), values in next(iter(shown.values())).items():
        if n := len(values["entropy"]):
            means = {f"{key}_{answer}": float(value.mean()) for key, value in values.items()}
            results += context.log.log(means, n=n, split="test", attack="none" if images == "clean" else images)
    rows = {
        run: [[*key, len(values["entropy"]), *_moments(values["entropy"]), *_moments(values["confidence"])]
              for key, values in groups.items()]
        for run, groups in shown.items()
    }  # fmt: skip
    columns = ("images", "answer", "n", "entropy_mean", "entropy_sd", "confidence_mean", "confidence_sd")
    tabulate(context, "entropy", columns, rows)
    context.draw("entropy", _draw_entropy(shown), "and confidence of the predictions, right and wrong answers")
    return results


def _answers(context: AnalysisContext) -> Groups:
    """Entropies and confidences by images and answer."""
    groups: Groups = {}
    for images in ("clean", *context.attacks):
        pred = context.outcomes[f"{images}_pred"].astype(int)
        right = pred == context.outcomes["label"]
        if count := int((pred < 0).sum()):  # wrong, but without entropy and confidence
            log.warning("entropy: %s: %d predictions are not finite and left out", images, count)
        for answer, mask in (("right", right), ("wrong", ~right & (pred >= 0))):
            keys = ("entropy", "confidence")
            groups[images, answer] = {key: context.outcomes[f"{images}_{key}"][mask].astype(float) for key in keys}
    return groups


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a sample."""
    n = len(values)
    return float(values.mean()) if n else math.nan, float(values.std(ddof=1)) if n > 1 else math.nan


def _draw_entropy(shown: Mapping[str, Groups]) -> Any:
    """A row for each attack, but for those that changed nothing: an attack may get the survivors of others only."""
    images = [_changed(groups) for groups in shown.values()]
    figure, parts = figures.panels(list(shown), [(9, 1.2 + 1.5 * len(kept)) for kept in images])
    every = [values["entropy"] for groups in shown.values() for values in groups.values()]
    highest = max(values.max(initial=0) for values in every) or 1.0
    for part, groups, kept in zip(parts, shown.values(), images, strict=True):
        axes = part.subplots(len(kept), 2, squeeze=False)
        for row, name in enumerate(kept):
            n = max(sum(len(groups[name, answer]["entropy"]) for answer in ("right", "wrong")), 1)
            for axis, key, top in zip(axes[row], ("entropy", "confidence"), (highest, 1.0), strict=True):
                for answer, colour in (("right", RIGHT), ("wrong", WRONG)):
                    values = groups[name, answer][key]
                    axis.hist(
                        values, bins=np.linspace(0, top, 31), weights=np.full(len(values), 100 / n), alpha=0.55,
                        histtype="stepfilled", color=colour, edgecolor=colour, label=f"{answer}, n = {len(values)}",
                    )  # fmt: skip
                axis.set(xlim=(0, top), ylim=(0, max(axis.get_ylim()[1], 1.1)), ylabel="% of samples")
            axes[row, 0].set_title(name, loc="left", fontsize=11, fontweight="bold")
            axes[row, 0].legend(frameon=False, fontsize=9)
        axes[-1, 0].set_xlabel("entropy of the prediction, bits")
        axes[-1, 1].set_xlabel("confidence, the largest probability")
    return figure


def _changed(groups: Groups) -> list[str]:
    """The clean images, and those attacks that changed an answer since the one before."""
    kept: list[str] = []
    for name in dict.fromkeys(name for name, _ in groups):
        if not kept or not all(_equal(groups[name, key], groups[kept[-1], key]) for key in ("right", "wrong")):
            kept.append(name)
    return kept


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(values, other[key]) for key, values in one.items())


def confusion(context: AnalysisContext, *, runs: Sequence[FinishedRun] = ()) -> list[Result]:
    """Which class is confused with which: on the clean images, and on those of the first attack that fools a sample.

    Only attacks within a run's threat model take part. `runs` are other finished runs on the same samples to show
    beside this one. Writes figures/confusion.png and tables/confusion.csv (a line for each pair of classes that
    occurs). A prediction may also be no class (logits not finite) or one that the dataset does not have.
    """
    label, names = context.outcomes["label"], context.class_names
    shown = {name: _predicted(its) for name, its in beside(context, runs).items()}
    rows = {
        run: [
            [images, class_name(names, true), class_name(names, guess), count]
            for images, pred in predicted.items()
            for (true, guess), count in sorted(Counter(zip(label.tolist(), pred.tolist(), strict=True)).items())
        ]
        for run, predicted in shown.items()
    }
    tabulate(context, "confusion", ("images", "true", "predicted", "n"), rows)
    counted = [name for name, info in context.attacks.items() if info.get("counts", True)]
    caption = f"which class becomes which, clean and under {', '.join(counted) or 'no attack'}"
    context.draw("confusion", _draw_confusion(label, shown, names), caption)
    return []


def _predicted(context: AnalysisContext) -> dict[str, np.ndarray]:
    label, after = context.outcomes["label"], context.outcomes["clean_pred"].copy()
    counted = [name for name, info in context.attacks.items() if info.get("counts", True)]
    for name in counted:
        after = np.where(after == label, context.outcomes[f"{name}_pred"], after)
    return {"clean": context.outcomes["clean_pred"]} | ({"under attack": after} if counted else {})


def _draw_confusion(label: np.ndarray, shown: Mapping[str, Mapping[str, np.ndarray]], names: tuple[str, ...]) -> Any:
    k = len(names)
    side = 1.8 + (0.38 * k if k <= _READABLE else 5)
    short = [name[:14] for name in (*names, "none of these")] if k <= _READABLE else []
    figure, parts = figures.panels(list(shown), [(side * len(each) + 1, side) for each in shown.values()])
    for part, predicted in zip(parts, shown.values(), strict=True):
        axes = part.subplots(1, len(predicted), squeeze=False)
        for axis, (title, pred) in zip(axes[0], predicted.items(), strict=True):
            # One more column for predictions that are none of the k classes, if there are any.
            counts = np.zeros((k, k + bool(((pred < 0) | (pred >= k)).any())), int)
            np.add.at(counts, (label, np.where(pred < 0, k, np.minimum(pred, k))), 1)
            share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)

            def text(row: int, column: int, share: np.ndarray = share) -> str:
                return f"{share[row, column]:.0f}" if share[row, column] >= 0.5 else ""

            image = figures.heatmap(axis, share, short[:k], short[: counts.shape[1]], text, rotation=60)
            axis.set(title=title, xlabel="predicted class", ylabel="true class", aspect="equal")
        part.colorbar(image, ax=axes, label="% of the true class")
    return figure


def norms(context: AnalysisContext, *, runs: Sequence[FinishedRun] = ()) -> list[Result]:
    """How far the adversarial examples are from their images, in L2 and in Linf, by attack.

    Of the samples that were right and that the attack fooled; an attack on the survivors of others has only those that
    it fooled itself. `runs` are other finished runs on the same samples to show beside this one. Writes
    figures/norms.png (the share of them within a distance, for attacks that fooled 10 samples or more),
    tables/norms.csv with the median and the quartiles, and, of this run, a Result of each median. NotMade if no attack
    fooled a sample.
    """
    contexts = beside(context, runs)
    shown = {name: _sizes(its) for name, its in contexts.items()}
    if not any(shown.values()):
        raise NotMade("no attack fooled a sample")
    results: list[Result] = []
    for name, both in next(iter(shown.values())).items():
        medians = {f"median_{key}": float(np.median(values)) for key, values in both.items()}
        results += context.log.log(medians, n=len(both["l2"]), split="test", attack=name)
    rows = {
        run: [
            [name, key, len(values), *np.quantile(values, (0.25, 0.5, 0.75)).tolist()]
            for name, both in sizes.items()
            for key, values in both.items()
        ]
        for run, sizes in shown.items()
    }
    columns = ("attack", "norm", "n", "quartile_1", "median", "quartile_3")
    tabulate(context, "norms", columns, rows)
    drawn = {
        run: {name: both for name, both in sizes.items() if len(both["l2"]) >= _FEWEST} for run, sizes in shown.items()
    }
    if any(drawn.values()):
        few = [
            f"{name} ({len(sizes[name]['l2'])})" for r, sizes in shown.items() for name in sizes if name not in drawn[r]
        ]
        caption = "sizes of the adversarial perturbations" + (f"; too few to draw: {', '.join(few)}" if few else "")
        kept = {run: (contexts[run], sizes) for run, sizes in drawn.items() if sizes}
        context.draw("norms", _draw_norms(kept), caption)
    return results


Sizes = dict[str, dict[str, np.ndarray]]


def _sizes(context: AnalysisContext) -> Sizes:
    """Of each attack that fooled a sample the perturbations' norms."""
    sizes: Sizes = {}
    for name in context.attacks:
        fooled = context.attacked(name) & (context.outcomes[f"{name}_pred"] != context.outcomes["label"])
        if fooled.any():
            sizes[name] = {key: context.outcomes[f"{name}_{key}"][fooled].astype(float) for key in ("l2", "linf")}
    return sizes


def _draw_norms(shown: Mapping[str, tuple[AnalysisContext, Sizes]]) -> Any:
    from matplotlib.ticker import PercentFormatter

    figure, parts = figures.panels(list(shown), [(9, 3.6)] * len(shown))
    widest = {
        key: max(both[key].max() for _, sizes in shown.values() for both in sizes.values()) for key in ("l2", "linf")
    }
    for part, (context, sizes) in zip(parts, shown.values(), strict=True):
        for axis, title in zip(part.subplots(1, 2), ("L2", "Linf"), strict=True):
            top = widest[title.lower()]
            for number, (name, both) in enumerate(sizes.items()):
                values = both[title.lower()]
                colour = _ATTACK_COLOURS[number % len(_ATTACK_COLOURS)]
                style = "-" if number < len(_ATTACK_COLOURS) else "--"
                axis.ecdf(values, color=colour, linestyle=style, label=f"{name}, n = {len(values)}")
            if title == context.norm:
                axis.axvline(context.eps, color="black", linestyle=":", label=f"the run's eps, {eps_text(context.eps)}")
                top = max(top, context.eps)
            axis.set(xlabel=f"{title} norm of the perturbation, pixels in [0, 1]", xlim=(0, 1.05 * top), ylim=(0, 1.01))
            axis.set_ylabel("fooled samples within this size")
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
    return figure

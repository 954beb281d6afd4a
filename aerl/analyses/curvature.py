"""The loss near each image: how steep it is, and how fast its gradient turns."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from aerl.analyses import AnalysisContext, Beside, Subject
from aerl.analyses.gradients import loss_gradient
from aerl.attacks import attacking, losses
from aerl.attacks.projections import ascent_direction, norms
from aerl.data import Split, to_unit
from aerl.report import figures
from aerl.tracking.results import Result
from aerl.types import Count, Positive

Measured = tuple[float, dict[str, np.ndarray]]  # the share without a gradient, and both statistics of the others

# Statistic: label of its axis.
_PANELS = {
    "gradient_norm": "L2 norm of the input gradient, nats per unit",
    "curvature": "change of the gradient along itself, nats per unit squared",
}


@dataclass(frozen=True, kw_only=True)
class Curvature(Beside):
    """The input gradient's L2 norm and the loss's curvature along it, at correctly classified images.

    The curvature is ||grad(x + step * u) - grad(x)||_2 / step with u the gradient's direction, for pixels in [0, 1]
    (Moosavi-Dezfooli et al. 2019, section 4.1). Gradients that are zero or not finite are counted and left out. The
    images are those that this run's model classifies correctly; `runs` are other runs to show beside it. Writes
    figures/curvature.png, tables/curvature.csv and a Result of each median of this run. NotMade if no image is
    classified correctly.
    """

    samples: Count = 500
    loss: Literal["ce", "log_odds", "margin"] = "ce"
    step: Positive = 0.01

    def __call__(self, context: AnalysisContext) -> list[Result]:
        images, subjects = context.right(self.samples), self.subjects(context)
        found = [self._measure(replace(context, model=subject.model), images) for subject in subjects]
        rows = []
        for subject, (zero, values) in zip(subjects, found, strict=True):
            for name, kept in values.items():
                quartiles = np.quantile(kept, (0.25, 0.5, 0.75)).tolist() if len(kept) else [np.nan] * 3
                rows.append([subject.name, name, len(images), zero, *quartiles])
        context.table("curvature", ("model", "what", "n", "zero", "quartile_1", "median", "quartile_3"), rows)
        caption = f"norm of the input gradient and curvature at clean images, loss {self.loss}"
        context.draw("curvature", _draw(subjects, found, self.loss), caption)
        medians = {f"{row[1]}_median": row[5] for row in rows[: len(_PANELS)]} | {"gradient_zero": found[0][0]}
        context.save(curvature={"n": len(images), "loss": self.loss, **medians})
        return context.log.log(medians, n=len(images), split="test", attack="curvature")

    def _measure(self, context: AnalysisContext, images: Split) -> Measured:
        device, loss = context.hardware.device, getattr(losses, self.loss)
        norm, bend = [], []
        with attacking(context.model):
            for rows in torch.split(torch.arange(len(images)), context.batch_size):
                x, y = to_unit(images.images[rows].to(device)), images.labels[rows].to(device)
                here = loss_gradient(context.model, loss, x, y)
                there = loss_gradient(context.model, loss, x + self.step * ascent_direction(here, "L2"), y)
                norm.append(norms(here, "L2").flatten().cpu())
                bend.append((norms(there - here, "L2") / self.step).flatten().cpu())
        values = torch.stack([torch.cat(norm), torch.cat(bend)]).double().numpy()
        alive = (values[0] > 0) & np.isfinite(values[1])
        return float(1 - alive.mean()), dict(zip(_PANELS, values[:, alive], strict=True))


def _draw(subjects: list[Subject], found: list[Measured], loss: str) -> Any:
    figure, axes = figures.subplots(1, len(_PANELS), figsize=(9, 3.4))
    figure.suptitle(f"The loss ({loss}) at clean images")
    for axis, (name, label) in zip(axes[0], _PANELS.items(), strict=True):
        axis.set(xlabel=label, ylabel="% of samples")
        positive = [values[name][values[name] > 0] for _, values in found]
        if all(len(each) == 0 for each in positive):
            continue
        low, high = (np.log10(end(np.concatenate(positive))) for end in (np.min, np.max))
        bins = np.logspace(low - 0.05, high + 0.05, 31)
        for subject, (zero, values), each in zip(subjects, found, positive, strict=True):
            n, colour = len(values[name]), figures.trainer_colour(subject.trainer)
            median = float(np.median(values[name])) if n else np.nan
            text = f"{subject.name}: median {median:.3g}, no gradient: {zero:.1%}"
            weights = np.full(len(each), 100 / max(n, 1))
            kind = "stepfilled" if len(subjects) == 1 else "step"
            axis.hist(each, bins=bins, weights=weights, color=colour, label=text, histtype=kind)
            axis.axvline(median, color="black" if len(subjects) == 1 else colour, linestyle=":")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure

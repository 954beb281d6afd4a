"""The worst case against eps, of this run and of others: the curve that `eps=[...]` measures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aerl.analyses.context import AnalysisContext, NotMade
from aerl.analyses.others import FinishedRun
from aerl.config.compose import run_names
from aerl.errors import UserError
from aerl.report import figures
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import read_config, read_summary, trainer_of

_COLUMNS = ("run", "eps", "value", "low", "high", "n")


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """Accuracy on clean images (eps 0) and in the worst case at each eps of the run, with 95 % intervals.

    `runs` are finished runs of the same dataset and norm to show beside this one, each at the eps that it was judged
    at. Writes figures/worst_case.png and tables/worst_case.csv. Raises UserError for a run under another norm.
    """

    runs: list[FinishedRun] = field(default_factory=list)

    def __call__(self, context: AnalysisContext) -> None:
        here = context.log.path.parent
        summary = read_summary(here) or {}
        names = [context.this_run if self.runs else context.trainer, *run_names(self.runs)]
        shown = {names[0]: (context.trainer, _points(summary, context.eps))}
        if len(shown[names[0]][1]) < 2:
            raise NotMade("no attack counts")
        for name, run in zip(names[1:], self.runs, strict=True):
            folder = Path(run).expanduser()
            other, config = read_summary(folder) or {}, read_config(folder)
            theirs, ours = (config["norm"], other["dataset"]), (context.norm, summary["dataset"])
            if theirs != ours:
                raise UserError(f"runs={run}: is of {theirs[0]} on {theirs[1]}, this run of {ours[0]} on {ours[1]}")
            shown[name] = trainer_of(other), _points(other, config["eps"])
        rows = [
            [name, *(point[key] for key in _COLUMNS[1:])] for name, (_, points) in shown.items() for point in points
        ]
        context.table("worst_case", _COLUMNS, rows)
        caption = f"accuracy in the worst case against {context.norm} eps, with 95 % intervals"
        context.draw("worst_case", _draw(shown, context.norm), caption)


def _points(summary: dict[str, Any], eps: float) -> list[dict[str, float]]:
    """`eps`, `value`, `low`, `high` and `n` of clean images and of each worst case."""
    worst = summary["worst_case_accuracy"]
    by_eps = summary.get("worst_case_by_eps") or ([{"eps": eps, **worst}] if worst else [])
    return [{"eps": 0.0, **summary["clean_accuracy"]}, *by_eps]


def _draw(shown: dict[str, tuple[str, list[dict[str, float]]]], norm: str) -> Any:
    figure, ((axis,),) = figures.subplots(figsize=(6.4, 4.2))
    lines = ("-", "--", ":", "-.")
    drawn: list[str] = []
    for name, (trainer, points) in shown.items():
        eps, value, low, high = ([point[key] for point in points] for key in ("eps", "value", "low", "high"))
        colour = figures.trainer_colour(trainer)
        axis.fill_between(eps, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, linewidth=0)
        style = lines[drawn.count(trainer) % len(lines)]
        axis.plot(eps, [100 * v for v in value], marker="o", linestyle=style, color=colour, label=name)
        drawn.append(trainer)
    ticks = sorted({point["eps"] for _, points in shown.values() for point in points})
    axis.set_xticks(ticks, [eps_text(tick) for tick in ticks])
    axis.set(ylim=(0, 100), xlim=(0, None), xlabel=f"{norm} eps", ylabel="accuracy in the worst case, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure

"""Conditions of training next to each other, and the waterfall that adds up their causes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aerl.analyses.context import AnalysisContext
from aerl.analyses.others import FinishedRun, Samples, check_same_samples, samples
from aerl.errors import UserError
from aerl.evaluation.statistics import crossed_interval, mean_difference, reward
from aerl.report import figures
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result, read_config, read_summary

_COLUMNS = ("label", "trainer", "attack", "normalisation", "accuracy", "low", "high", "seeds", "n")
_DIFFERENCE = ("difference", "difference_low", "difference_high")
_WORST, _PAPER, _CLEAN = "worst_case", "pgd_paper", "clean"


@dataclass(frozen=True)
class Judged:
    """What a finished run measured: `outcomes` as in outcomes.npz, and the attacks that count in its worst case."""

    outcomes: Mapping[str, np.ndarray]
    counted: Sequence[str]
    attacks: Sequence[str]

    def rewards(self, attack: str, where: str) -> np.ndarray:
        """(n,) of each sample, clean and under an attack, under all that count, or without any."""
        if attack not in (_CLEAN, _WORST, *self.attacks):
            known = ", ".join((_CLEAN, _WORST, *self.attacks))
            raise UserError(f"steps: attack {attack} was not run on {where}; known: {known}")
        names = {_CLEAN: [], _WORST: self.counted}.get(attack, [attack])
        return reward(self.outcomes, names)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The trainers of `runs` next to each other: clean, under the paper's attack, and in the worst case.

    Runs of one trainer differ in their seed; the name of a trainer is its condition. A run that evaluated another one
    stands for that one's trainer and seed, and brings it along. `saturated` is the share of the correctly classified
    images whose probability of the label is exactly 1 in float32; `missed` the share of the images that some attack
    fools and `pgd_paper` does not. Intervals are over seeds and samples.

    steps: of a waterfall, each {label, trainer, attack, withheld}: from the accuracy of the first step to that of the
    last, one cause at a time. `attack` is clean, worst_case or the name of one; `withheld` takes the runs that were
    judged with evaluation.withhold_normalization=true.

    against: pairs of trainers, [this one, the one that it differs from in a single cause]: figures/effects.png and
    tables/effects.csv have their differences.

    Writes tables/conditions.csv and figures/conditions.png, with steps also tables/waterfall.csv and
    figures/waterfall.png. Raises UserError if the runs have other samples, or lack a step.
    """

    runs: list[FinishedRun]
    steps: list[dict[str, Any]] = field(default_factory=list)
    against: list[tuple[str, str]] = field(default_factory=list)
    tested: Samples | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=[]: name the run folders to compare")
        known = {"label", "trainer", "attack", "withheld"}
        for step in self.steps:
            if unknown := set(step) - known or {"label", "trainer"} - set(step):
                raise UserError(
                    f"steps: {step}: {', '.join(sorted(unknown))}: expected label, trainer, attack, withheld"
                )

    def __call__(self, context: AnalysisContext) -> list[Result]:
        judged, threat, n = _read(self.runs)
        seeds = sorted({seed for runs in judged.values() for seed in runs})
        caption = f"{threat}, n = {n}, seeds {', '.join(map(str, seeds))}"
        results = self._conditions(context, judged, caption)
        if self.steps:
            self._waterfall(context, judged, caption)
        if self.against:
            self._effects(context, judged, caption)
        return results

    def _effects(self, context: AnalysisContext, judged: "Runs", caption: str) -> None:
        rows: list[list[Any]] = []
        for trainer, base in self.against:
            one, other = (_of(judged, name, False, "against") for name in (trainer, base))
            for attack in (_CLEAN, _PAPER, _WORST):
                pair = (_rewards(seeds, attack, "against") for seeds in (one, other))
                rows.append([trainer, base, attack, *mean_difference(*pair, same_models=False)])
        context.table("effects", ("trainer", "against", "attack", *_DIFFERENCE), rows)
        context.draw("effects", _changes(rows, caption), caption)

    def _conditions(self, context: AnalysisContext, judged: "Runs", caption: str) -> list[Result]:
        rows, results = [], []
        for (trainer, withheld), seeds in judged.items():
            row: dict[str, Any] = {"trainer": trainer, "normalisation": "withheld" if withheld else ""}
            for attack in (_CLEAN, _PAPER, _WORST):
                names = {name for run in seeds.values() for name in (_CLEAN, _WORST, *run.attacks)}
                if attack in names:
                    rewards = _rewards(seeds, attack, trainer)
                    low, high = crossed_interval(rewards)
                    row |= {attack: float(rewards.mean()), f"{attack}_low": low, f"{attack}_high": high}
            row |= {"saturated": _saturated(seeds), "missed": _missed(seeds), "seeds": len(seeds)}
            rows.append(row)
            results += context.log.log(
                {f"condition_{key}": row[key] for key in ("saturated", "missed") if row[key] is not None},
                n=len(rewards[0]), split="test", source=trainer,
            )  # fmt: skip
        columns = list(dict.fromkeys(key for row in rows for key in row))
        context.table("conditions", columns, [[row.get(key) for key in columns] for row in rows])
        trained = [row for row in rows if not row["normalisation"]]
        context.draw("conditions", _dots(trained, caption), caption)
        return results

    def _waterfall(self, context: AnalysisContext, judged: "Runs", caption: str) -> None:
        rows: list[list[Any]] = []
        before, base = np.empty((0, 0)), ("", False)
        for step in self.steps:
            key = (step["trainer"], bool(step.get("withheld", False)))
            attack = step.get("attack", _WORST)
            rewards = _rewards(_of(judged, *key, f"steps: {step['label']}"), attack, step["label"])
            low, high = crossed_interval(rewards)
            row = [step["label"], key[0], attack, "withheld" if key[1] else "", float(rewards.mean()), low, high]
            difference: Sequence[float | None] = (None, None, None)
            if rows:
                same = base[0] == key[0] and len(before) == len(rewards)
                difference = mean_difference(rewards, before, same_models=same)
            rows.append([*row, len(rewards), rewards.shape[1], *difference])
            before, base = rewards, key
        context.table("waterfall", [*_COLUMNS, *_DIFFERENCE], rows)
        context.draw("waterfall", _bars(rows, caption), caption)


Runs = dict[tuple[str, bool], dict[int, Judged]]  # by trainer and whether the normalisation was withheld, by seed


def _read(folders: Sequence[str]) -> tuple[Runs, str, int]:
    """The runs and those whose models they evaluated, each once; their norm and eps in words, and how many samples."""
    found: Runs = {}
    first: tuple[str, Samples, str] | None = None
    for run in folders:
        here = Path(run).expanduser()
        origin = (read_summary(here) or {}).get("origin") or {}
        there = Path(origin["folder"]) if origin.get("folder") else None
        for folder in (here, there):
            if folder is None or not (folder / "outcomes.npz").is_file():
                continue
            summary, tested, config = read_summary(folder) or {}, samples(folder), read_config(folder)
            threat = f"{config['norm']} eps {eps_text(config['eps'])}"
            first = first or (str(folder), tested, threat)
            check_same_samples(str(folder), first[1], tested)
            if threat != first[2]:
                raise UserError(f"runs: {folder} was judged under {threat}, {first[0]} under {first[2]}")
            owner = summary.get("origin") or summary
            key = str(owner["trainer"]), summary.get("normalization") == "withheld"
            counted = [name for name, info in summary["attacks"].items() if info.get("counts", True)]
            found.setdefault(key, {})[int(owner["seed"])] = Judged(tested[1], counted, list(summary["attacks"]))
    assert first is not None  # every one of the runs has outcomes
    return found, first[2], len(first[1][1]["label"])


def _of(judged: Runs, trainer: str, withheld: bool, where: str) -> dict[int, Judged]:
    if (trainer, withheld) in judged:
        return judged[trainer, withheld]
    known = ", ".join(f"{name}{' (withheld)' * off}" for name, off in judged)
    raise UserError(f"{where}: no run of {trainer}{' (withheld)' * withheld}; known: {known}")


def _rewards(seeds: Mapping[int, Judged], attack: str, where: str) -> np.ndarray:
    """(seeds, n)."""
    return np.stack([seeds[seed].rewards(attack, where) for seed in sorted(seeds)])


def _saturated(seeds: Mapping[int, Judged]) -> float | None:
    right = [run.rewards(_CLEAN, "") > 0.5 for run in seeds.values()]
    certain = [run.outcomes["clean_p"] == 1 for run in seeds.values()]
    total = sum(int(each.sum()) for each in right)
    return sum(int((r & c).sum()) for r, c in zip(right, certain, strict=True)) / total if total else None


def _missed(seeds: Mapping[int, Judged]) -> float | None:
    """Of the images that an attack that counts fools, the share that pgd_paper does not."""
    fooled = missed = 0
    for run in seeds.values():
        if _PAPER not in run.attacks or not run.counted:
            return None
        lost = (run.rewards(_CLEAN, "") > 0.5) & (run.rewards(_WORST, "") < 0.5)
        fooled += int(lost.sum())
        missed += int((lost & (run.rewards(_PAPER, "") > 0.5)).sum())
    return missed / fooled if fooled else None


_KINDS = (
    (_CLEAN, figures.GREY, "clean", 0.2),
    (_PAPER, figures.VERMILION, "the paper's attack", 0.0),
    (_WORST, figures.BLUE, "worst case", -0.2),
)


def _changes(rows: Sequence[Sequence[Any]], caption: str) -> Any:
    """A line for each cause: how it changes each accuracy."""
    pairs = list(dict.fromkeys((row[0], row[1]) for row in rows))
    figure, ((axis,),) = figures.subplots(figsize=(9.5, 1.4 + 0.42 * len(pairs)))
    for key, colour, label, offset in _KINDS:
        for trainer, base, attack, *numbers in rows:
            if attack == key:
                place, (value, *ends) = offset - pairs.index((trainer, base)), [100 * number for number in numbers]
                axis.plot(ends, [place, place], color=colour, linewidth=1.2, alpha=0.6)
                axis.plot(value, place, "o", color=colour, markersize=5)
        axis.plot([], [], "o-", color=colour, markersize=5, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(-np.arange(len(pairs)), [f"{trainer} against {base}" for trainer, base in pairs])
    axis.set(xlabel="difference, points", title=f"{caption}; lines: 95 % intervals")
    axis.title.set_fontsize(10)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    return figure


def _dots(rows: Sequence[Mapping[str, Any]], caption: str) -> Any:
    """A line for each condition: its accuracies with their intervals, and how saturated it is."""
    figure, axes = figures.subplots(
        1, 2, figsize=(10.5, 1.9 + 0.42 * len(rows)), sharey=True, gridspec_kw={"width_ratios": [5, 2]}
    )
    for key, colour, label, offset in _KINDS:
        for place, row in enumerate(rows):
            if key in row:
                value, *ends = (100 * row[f"{key}{end}"] for end in ("", "_low", "_high"))
                axes[0, 0].plot(ends, [offset - place] * 2, color=colour, linewidth=1.2, alpha=0.6)
                axes[0, 0].plot(value, offset - place, "o", color=colour, markersize=5)
        axes[0, 0].plot([], [], "o-", color=colour, markersize=5, label=label)
    for key, colour, label, offset in (
        ("saturated", figures.PURPLE, "right images with p = 1 in float32", 0.17),
        ("missed", figures.ORANGE, "fooled images that the paper's attack misses", -0.17),
    ):
        values = [100 * (row[key] or 0) for row in rows]
        axes[0, 1].barh(offset - np.arange(len(rows)), values, height=0.3, color=colour, label=label)
    axes[0, 0].set_yticks(-np.arange(len(rows)), [row["trainer"] for row in rows])
    axes[0, 0].set(xlabel="accuracy, %", xlim=(0, None))
    axes[0, 1].set(xlabel="share, %", xlim=(0, None))
    for axis, columns in zip(axes[0], (3, 1), strict=True):
        axis.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1))
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{caption}; lines: 95 % intervals", fontsize=10)
    return figure


def _bars(rows: Sequence[Sequence[Any]], caption: str) -> Any:
    """The waterfall: totals at both ends, between them the differences, each with its interval."""
    figure, ((axis,),) = figures.subplots(figsize=(9.5, 1.4 + 0.42 * (len(rows) + 1)))

    def bar(place: int, start: float, end: float, interval: Sequence[float], colour: str, text: str) -> None:
        axis.barh(-place, end - start, left=start, color=colour, height=0.62)
        axis.plot(interval, [-place, -place], color="black", linewidth=1)
        axis.text(max(start, end, *interval) + 0.6, -place, text, va="center", fontsize=9)

    percent = [[100 * number for number in row[4:7]] for row in rows]
    for place, (row, (value, *interval)) in enumerate(zip(rows, percent, strict=True)):
        if place == 0:
            bar(0, 0.0, value, interval, figures.GREY, f"{value:.1f}")
            continue
        before = percent[place - 1][0]
        colour = figures.VERMILION if value >= before else figures.BLUE
        bar(place, before, value, [before + 100 * end for end in row[-2:]], colour, f"{value - before:+.1f}")
        axis.plot([before, before], [0.31 - place, 0.69 - place], color="grey", linewidth=0.8)
    value, *interval = percent[-1]
    bar(len(rows), 0.0, value, interval, figures.GREY, f"{value:.1f}")
    axis.set_yticks(range(0, -len(rows) - 1, -1), [*(row[0] for row in rows), "together"])
    axis.set(xlabel="accuracy, %", xlim=(0, None))
    axis.set_title(f"{caption}\nbars: change by each step; lines: 95 % intervals", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    return figure

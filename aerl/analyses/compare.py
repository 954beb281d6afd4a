"""Paired comparison with other runs on the same samples, so that only the models differ."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from aerl.analyses.context import AnalysisContext
from aerl.analyses.others import FinishedRun, Samples, check_same_samples, samples
from aerl.evaluation.statistics import mcnemar, paired_difference, right
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result, read_config, read_summary

log = logging.getLogger("aerl")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare with each of `runs`: on clean images, under every attack that both runs share, and their worst case.

    Of each: `difference` in accuracy (this run's minus the other's) with its 95 % interval `low` to `high`
    (Newcombe 1998, method 10), the discordant counts `b` (samples correct here only) and `c` (there only), and
    McNemar's exact two-sided `p`, not corrected for the number of rows. An attack is shared if norm and eps are
    the same and, if it got only the survivors of earlier attacks, so are those; if its other settings differ, it is
    compared with a warning. The worst case is that of the shared attacks that count in both runs. Writes `comparisons`
    in summary.json, tables/compare.csv and Results. Raises UserError if the dataset or the samples differ, of this
    run's `tested` ones already when it is made.
    """

    runs: list[FinishedRun]
    tested: Samples | None = None

    def __post_init__(self) -> None:
        for run in self.runs:
            if self.tested:
                check_same_samples(run, self.tested, samples(Path(run).expanduser()))

    def __call__(self, context: AnalysisContext) -> list[Result]:
        comparisons = {run: _comparison(context, run) for run in self.runs}
        context.save(comparisons=comparisons)
        table = [
            {"run": run, "attack": name, **row}
            for run, comparison in comparisons.items()
            for name, row in comparison["rows"].items()
        ]
        if table:
            context.table("compare", list(table[0]), [list(row.values()) for row in table])
        return [result for row in table for result in _log(context, row)]


def _comparison(context: AnalysisContext, run: str) -> dict[str, Any]:
    folder, here = Path(run).expanduser(), context.log.path.parent
    summary, ours = read_summary(folder) or {}, context.outcomes
    there = samples(folder)
    theirs = there[1]
    check_same_samples(run, (str((read_summary(here) or {}).get("dataset")), ours), there)
    attacks, other_attacks = context.attacks, summary.get("attacks", {})
    config, other_config = _config(here), _config(folder)
    shared, warnings = [], []
    for name in (name for name in attacks if name in other_attacks):
        threat, other_threat = _threat(attacks, name), _threat(other_attacks, name)
        if threat != other_threat or threat == "not run":
            warnings.append(f"{name} is not compared: {threat} here, {other_threat} there")
            continue
        shared.append(name)
        of = attacks[name].get("of", name)
        settings, other = (each["attack"].get(of, {}) for each in (config, other_config))
        if differing := [key for key in {**settings, **other} if settings.get(key) != other.get(key)]:
            values = (f"{key} is {settings.get(key)} here, {other.get(key)} there" for key in differing)
            warnings.append(f"{name} is not the same attack: {', '.join(values)}")
    if summary.get("normalization") != (read_summary(here) or {}).get("normalization"):
        warnings.append("one of the two was judged without the normalisation of its training")
    if "sample" in (config["policy"], other_config["policy"]):
        warnings.append("compared by the likeliest class, although evaluation.policy is sample")
    for warning in warnings:
        log.warning("compared with %s: %s", run, warning)
    groups: dict[str, list[str]] = {"clean": []} | {name: [name] for name in shared}
    if counted := [n for n in shared if attacks[n].get("counts", True) and other_attacks[n].get("counts", True)]:
        groups["worst_case"] = counted
    rows = {name: _row(right(ours, group), right(theirs, group)) for name, group in groups.items()}
    return {"rows": rows, "warnings": warnings}


def _threat(attacks: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """In words, what must be equal for the outcomes of an attack to be comparable."""
    info = attacks[name]
    if any(str(warning).startswith("not run") for warning in info.get("warnings", ())):
        return "not run"
    words = f"{info['norm']} eps {eps_text(info['eps'])}"
    earlier = [other for other in takewhile(lambda other: other != name, attacks) if attacks[other].get("counts")]
    if info.get("alone", True) or not earlier:  # it saw every right image
        return words
    return " ".join([words, "on the survivors of", *earlier])


def _config(folder: Path) -> dict[str, Any]:
    """The attacks and the policy of a run's config.yaml, if it has one."""
    config = read_config(folder) if (folder / "config.yaml").is_file() else {}
    return {"attack": config.get("attack") or {}, "policy": (config.get("evaluation") or {}).get("policy")}


def _row(here: np.ndarray, there: np.ndarray) -> dict[str, Any]:
    """The comparison of bool (n,), whether each sample is correct here and there."""
    n, both, b, c = len(here), *(int(cell.sum()) for cell in (here & there, here & ~there, ~here & there))
    low, high = paired_difference(both, b, c, n - both - b - c)
    accuracies = {"n": n, "accuracy": (both + b) / n, "other_accuracy": (both + c) / n}
    return accuracies | {"difference": (b - c) / n, "low": low, "high": high, "b": b, "c": c, "p": mcnemar(b, c)}


def _log(context: AnalysisContext, row: Mapping[str, Any]) -> list[Result]:
    name = row["attack"]
    threat = context.attacks.get(name)
    prefix = "robust" if threat else name
    setting = {"attack": name, "norm": threat["norm"], "eps": threat["eps"]} if threat else {}
    metrics = {f"{prefix}_accuracy_difference": row["difference"], f"{prefix}_mcnemar_p": row["p"]}
    return context.log.log(metrics, n=row["n"], split="test", source=row["run"], **setting)

"""Paired comparison of this run with others: the same samples, so that only the models differ."""

import logging
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator

from aerl.analyses import AnalysisContext
from aerl.evaluation.outcomes import right
from aerl.evaluation.statistics import mcnemar, paired_difference
from aerl.runtime.files import inside, load_arrays
from aerl.tracking.results import Result, changed_files, read_config, read_summary
from aerl.types import UserError, eps_text

log = logging.getLogger("aerl")

Outcomes = Mapping[str, npt.NDArray[np.generic]]
Right = npt.NDArray[np.bool_]


def _finished(run: str) -> str:
    """Told before anything is computed, because a comparison comes last."""
    folder = Path(run).expanduser()
    summary = read_summary(folder)
    if summary is None:
        raise ValueError("must be a run folder; it has no summary.json")
    if summary.get("status") != "finished":
        raise ValueError(f"must be finished; it is {summary.get('status')}, and its own command goes on with it")
    if not (folder / "outcomes.npz").is_file():
        raise ValueError("must have an outcomes.npz, which a run that attacks writes")
    if changed_files(folder, summary, ["outcomes.npz"]):
        raise ValueError("must have its own outcomes.npz; that was changed since the run finished, or is damaged")
    return run


FinishedRun = Annotated[str, AfterValidator(_finished)]


def compare(context: AnalysisContext, *, runs: list[FinishedRun]) -> list[Result]:
    """Compare with each of `runs`: on clean images, under every attack that both runs share, and their worst case.

    Of each: `difference` in accuracy (this run's minus the other's) with its 95 % interval `low` to `high`
    (Newcombe 1998, method 10), the discordant counts `b` (samples right here only) and `c` (there only), and
    McNemar's exact two-sided `p`, which knows nothing of how many rows are looked at. An attack is shared if
    norm and eps are the same and, where it got only the survivors of earlier ones, so are those; one whose other
    settings differ is compared with a warning. The worst case is that of the shared attacks that count in both
    runs. All of it is in summary.json under `comparisons`, in tables/compare.csv and in results.jsonl.
    Raises UserError where the other run is of another dataset or of other samples.
    """
    comparisons = {run: _comparison(context, run) for run in runs}
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
    summary = read_summary(folder) or {}
    theirs = load_arrays(inside(folder, folder / "outcomes.npz"), sealed=False)
    _check_same_samples(run, read_summary(here) or {}, summary, context.outcomes, theirs)
    attacks, warnings = summary.get("attacks", {}), []
    settings, other_settings = _settings(here), _settings(folder)
    shared = []
    for name in context.attacks:
        if name not in attacks:
            continue
        ours, other = _threat(context.attacks, name), _threat(attacks, name)
        if ours != other or ours.startswith("not run"):
            warnings.append(f"{name} is not compared: {ours} here, {other} there")
            continue
        shared.append(name)
        of = context.attacks[name].get("of", name)
        if differing := _differing(settings["attack"].get(of, {}), other_settings["attack"].get(of, {})):
            warnings.append(f"{name} is not the same attack: {differing}")
    if "sample" in (settings["policy"], other_settings["policy"]):
        warnings.append("compared by the likeliest class, although evaluation.policy is sample")
    counted = [n for n in shared if context.attacks[n].get("counts", True) and attacks[n].get("counts", True)]
    for warning in warnings:
        log.warning("compared with %s: %s", run, warning)
    here_right, there_right = _right(context.outcomes, shared, counted), _right(theirs, shared, counted)
    rows = {name: _row(here_right[name], there_right[name]) for name in here_right}
    return {"rows": rows, "warnings": warnings}


def _check_same_samples(
    run: str, here: Mapping[str, Any], there: Mapping[str, Any], ours: Outcomes, theirs: Outcomes
) -> None:
    """By the labels, and by the samples' places in the test set where both runs have kept them."""
    key = f"analysis.compare.runs={run}"
    if here.get("dataset") != there.get("dataset"):
        raise UserError(f"{key}: is of dataset {there.get('dataset')}, this run of {here.get('dataset')}")
    if len(ours["label"]) != len(theirs["label"]):
        raise UserError(
            f"{key}: has {len(theirs['label'])} samples, this run {len(ours['label'])}; "
            "the same evaluation.samples makes them the same"
        )
    for name, what in (("label", "labels"), ("index", "places in the test set")):
        if name in ours and name in theirs and not np.array_equal(ours[name], theirs[name]):
            raise UserError(f"{key}: has other samples than this run (their {what} differ), so they are no pairs")


def _threat(attacks: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """What must be the same of an attack for its outcomes to be comparable, in words."""
    told = attacks[name]
    if any(str(warning).startswith("not run") for warning in told.get("warnings", ())):
        return "not run"
    words = f"{told['norm']} eps {eps_text(told['eps'])}"
    if told.get("alone", True):
        return words
    earlier = [other for other in takewhile(lambda other: other != name, attacks) if attacks[other].get("counts")]
    return " ".join([words, "on the survivors of", *(earlier or ["none"])])


def _settings(folder: Path) -> dict[str, Any]:
    """What a run's config.yaml says of its attacks and its policy; nothing where there is none."""
    config = read_config(folder) if (folder / "config.yaml").is_file() else {}
    return {"attack": config.get("attack") or {}, "policy": (config.get("evaluation") or {}).get("policy")}


def _differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} is {here.get(key)} here, {there.get(key)} there"
        for key in dict.fromkeys([*here, *there])
        if here.get(key) != there.get(key)
    )


def _right(outcomes: Outcomes, attacks: list[str], counted: list[str]) -> dict[str, Right]:
    """bool (N,) for each row of the comparison: clean, under each of `attacks`, and under all of `counted`."""
    rows = {"clean": right(outcomes)} | {name: right(outcomes, [name]) for name in attacks}
    return rows | ({"worst_case": right(outcomes, counted)} if counted else {})


def _row(here: Right, there: Right) -> dict[str, Any]:
    n, both, b, c = (
        len(here),
        int((here & there).sum()),
        int((here & ~there).sum()),
        int((~here & there).sum()),
    )
    low, high = paired_difference(both, b, c, n - both - b - c)
    return {
        "n": n,
        "accuracy": (both + b) / n,
        "other_accuracy": (both + c) / n,
        "difference": (b - c) / n,
        "low": low,
        "high": high,
        "b": b,
        "c": c,
        "p": mcnemar(b, c),
    }


def _log(context: AnalysisContext, row: Mapping[str, Any]) -> list[Result]:
    name = row["attack"]
    threat = context.attacks.get(name)
    prefix = "robust" if threat else name
    setting = {"attack": name, "norm": threat["norm"], "eps": threat["eps"]} if threat else {}
    metrics = {f"{prefix}_accuracy_difference": row["difference"], f"{prefix}_mcnemar_p": row["p"]}
    return context.log.log(metrics, n=row["n"], split="test", source=row["run"], **setting)

"""What other finished runs saved, for analyses that show it next to this run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator

from aerl.analyses.context import AnalysisContext
from aerl.config.compose import run_names
from aerl.errors import UserError
from aerl.runtime.files import inside, load_arrays
from aerl.tracking.results import changed_files, read_config, read_summary, trainer_of


def _finished(run: str) -> str:
    """Checks a run when the configuration is read: a comparison comes last."""
    folder = Path(run).expanduser()
    summary = read_summary(folder)
    if summary is None:
        raise ValueError("must be a run folder; it has no summary.json")
    if summary.get("status") != "finished":
        raise ValueError(f"must be finished; it is {summary.get('status')}")
    if not (folder / "outcomes.npz").is_file():
        raise ValueError("must have an outcomes.npz, which a run that attacks writes")
    if changed_files(folder, summary, ["outcomes.npz"]):
        raise ValueError("its outcomes.npz was changed or damaged since the run finished")
    return run


Samples = tuple[str, Mapping[str, np.ndarray]]  # the dataset, and `label` and `index` of the samples
FinishedRun = Annotated[str, AfterValidator(_finished)]


def samples(folder: Path) -> Samples:
    outcomes = load_arrays(inside(folder, folder / "outcomes.npz"), sealed=False)
    return str((read_summary(folder) or {}).get("dataset")), outcomes


def check_same_samples(run: str, here: Samples, there: Samples) -> None:
    """Older runs have no `index` (place in the test set)."""
    key = f"runs={run}"
    (dataset, ours), (other_dataset, theirs) = here, there
    if dataset != other_dataset:
        raise UserError(f"{key}: is of dataset {other_dataset}, this run of {dataset}")
    if len(ours["label"]) != len(theirs["label"]):
        n, others = len(ours["label"]), len(theirs["label"])
        raise UserError(f"{key}: has {others} samples, this run {n}; use the same evaluation.samples")
    for name, what in (("label", "labels"), ("index", "places in the test set")):
        if name in ours and name in theirs and not np.array_equal(ours[name], theirs[name]):
            raise UserError(f"{key}: has other samples than this run (their {what} differ)")


def beside(context: AnalysisContext, runs: Sequence[str]) -> dict[str, AnalysisContext]:
    """This run's context and, for each of the finished `runs`, the same with what that run saved: outcomes, attacks,
    examples, norm, eps and trainer, but this run's model. By name, "" for a run alone; UserError if one has other
    samples."""
    shown = {context.this_run if runs else "": context}
    dataset = str((read_summary(context.log.path.parent) or {}).get("dataset"))
    for name, run in zip(run_names(runs), runs, strict=True):
        folder = Path(run).expanduser()
        there = samples(folder)
        check_same_samples(run, (dataset, context.outcomes), there)
        summary, config = read_summary(folder) or {}, read_config(folder)
        examples = folder / "examples.npz"
        adversarial = load_arrays(inside(folder, examples), sealed=False) if examples.is_file() else {}
        shown[name] = replace(
            context, outcomes=there[1], attacks=summary["attacks"], norm=config["norm"], eps=config["eps"],
            trainer=trainer_of(summary),
            adversarial={attack: torch.from_numpy(images) for attack, images in adversarial.items()},
        )  # fmt: skip
    return shown


def tabulate(
    context: AnalysisContext, name: str, columns: Sequence[str], rows: Mapping[str, Sequence[Sequence[Any]]]
) -> None:  # fmt: skip
    """tables/`name`.csv of the rows of each run, with a column `run` if they are of several."""
    if len(rows) == 1:
        context.table(name, columns, *rows.values())
    else:
        context.table(name, ["run", *columns], [[run, *row] for run, each in rows.items() for row in each])


def saved(runs: Sequence[str], key: str) -> dict[str, Any]:
    """What the analysis `key` saved in the summary.json of each of `runs`, by name; UserError where it is missing."""
    found = {}
    for name, run in zip(run_names(runs), runs, strict=True):
        found[name] = (read_summary(Path(run).expanduser()) or {}).get(key)
        if not found[name]:
            raise UserError(f"runs={run}: has no analysis={key}")
    return found

"""eps=[...]: one run with a worst case at each radius, and what it shows beside other runs."""

import csv
from pathlib import Path

import numpy as np
import pytest

from aerl.runtime.files import load_arrays
from aerl.tracking.results import read_results
from aerl.verify import verify
from tests.runs import finish, summary_of

SHORT = ("trainer.epochs=2", "attack=[fgsm,pgd]", "attack.pgd.steps=10", "evaluation.samples=80", "logger=none")
SAVED = ("distance", "entropy", "confusion", "norms", "pictures", "masking", "planted")  # read from another run's files
SIZES = ("analysis.distance.samples=20", "analysis.distance.steps=10", "analysis.masking.samples=10",
         "analysis.masking.steps=5", "analysis.masking.queries=5", "analysis.planted.samples=10",
         "analysis.pictures.samples=2")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """One run at three eps, and one at the largest alone."""
    place = tmp_path_factory.mktemp("eps")
    finish(
        place, data_dir, *SHORT, "eps=[0.5,0.25,1]", "name=several", f"analysis=[training,{','.join(SAVED)}]", *SIZES
    )
    finish(place, data_dir, *SHORT, "eps=1", "name=one", "analysis=none")
    return place


def test_the_worst_case_at_each_eps_is_over_the_attacks_within_it(runs):
    run = runs / "runs/several"
    summary, outcomes = summary_of(run), load_arrays(run / "outcomes.npz")
    assert list(summary["attacks"]) == [
        "fgsm_eps0.25", "pgd_eps0.25", "fgsm_eps0.5", "pgd_eps0.5", "fgsm", "pgd",
    ]  # fmt: skip
    survived, expected = outcomes["clean_pred"] == outcomes["label"], []
    for ending in ("_eps0.25", "_eps0.5", ""):
        for name in ("fgsm", "pgd"):
            survived = survived & (outcomes[f"{name}{ending}_pred"] == outcomes["label"])
        expected.append(survived.mean())
    found = summary["worst_case_by_eps"]
    assert [row["eps"] for row in found] == [0.25, 0.5, 1.0]
    assert [row["value"] for row in found] == pytest.approx(expected) and expected[0] > expected[2]
    assert found[-1]["value"] == summary["worst_case_accuracy"]["value"]
    assert not [fault for check in verify(run) for fault in check.faults]


def test_without_an_attack_there_is_no_worst_case_and_transfer_names_its_source(runs, data_dir):
    words = ("trainer=none", "checkpoint=runs/one", "eps=[0.5,1]", "analysis=none", "logger=none")
    finish(runs, data_dir, *words, "attack=none", "name=none")
    assert summary_of(runs / "runs/none")["worst_case_by_eps"] == []
    transfer = ("attack=transfer", "attack.transfer.sources=[runs/several]", "attack.transfer.steps=3")
    finish(runs, data_dir, *words, *transfer, "evaluation.samples=20", "name=transferred")
    results = read_results(runs / "runs/transferred/results.jsonl")
    assert {r.source for r in results if r.metric == "robust_accuracy"} == {"sl_seed0"}


def test_the_attacks_at_the_largest_eps_are_those_of_a_run_at_it_alone(runs):
    several, one = (load_arrays(runs / f"runs/{name}/outcomes.npz") for name in ("several", "one"))
    for name in ("fgsm", "pgd"):
        assert np.array_equal(several[f"{name}_l2"], one[f"{name}_l2"])


def test_other_runs_beside_this_one(runs, data_dir):
    several, models = runs / "runs/several", ("curve", "curvature", "weight_landscape")
    names = ("worst_case", "training", *SAVED, *models)
    beside = [f"analysis.{name}.runs=[{several}]" for name in names]
    sizes = (*SIZES, "analysis.curve.samples=20", "analysis.weight_landscape.resolution=3")
    finish(runs, data_dir, *SHORT, f"analysis=[{','.join(names)}]", *beside, *sizes, "seed=1", "name=beside")
    for name in names:
        assert (runs / f"runs/beside/figures/{name}.png").is_file()

    def rows(run, name):
        with Path(runs / f"runs/{run}/tables/{name}.csv").open() as file:
            return list(csv.DictReader(file))

    for name in ("worst_case", "entropy", "confusion", "norms", "masking"):
        theirs = [row for row in rows("beside", name) if row.pop("run") == "sl_seed0"]
        own = [{key: value for key, value in row.items() if key != "run"} for row in rows("several", name)]
        assert theirs == own and own
    for name in models[:2]:
        assert {row["model"] for row in rows("beside", name)} == {"sl (this run)", "sl_seed0"}


def test_runs_beside_this_one_must_fit(runs, data_dir):
    """Other samples, and an analysis that the other run lacks: said, and the run goes on."""
    beside = ("analysis.entropy.runs=[runs/several]", "analysis.planted.runs=[runs/one]")
    words = (*SHORT, "evaluation.samples=40", "analysis=[entropy,planted]", *beside, "name=other")
    done = finish(runs, data_dir, *words)
    assert "runs=runs/several: has 80 samples, this run 40; use the same evaluation.samples" in done.stderr
    assert "runs=runs/one: has no analysis=planted" in done.stderr


def test_a_run_that_cannot_be_shown_is_refused_before_anything_is_written(runs, launch):
    failed = launch(*SHORT, "analysis=distance", f"analysis.distance.runs=[{runs}/runs/one]", "name=x", cwd=runs)
    assert failed.returncode == 1 and "it has no tables/distance.csv" in failed.stderr
    assert not (runs / "runs/x").exists()

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """One run at three eps, and one at the largest alone."""
    place = tmp_path_factory.mktemp("eps")
    finish(place, data_dir, *SHORT, "eps=[0.5,0.25,1]", "name=several", "analysis=[training,distance]",
           "analysis.distance.samples=20", "analysis.distance.steps=10")  # fmt: skip
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
    several = runs / "runs/several"
    names = ("worst_case", "training", "distance", "curve", "curvature")
    beside = [f"analysis.{name}.runs=[{several}]" for name in names]
    sizes = ("analysis.distance.samples=20", "analysis.distance.steps=10", "analysis.curve.samples=20")
    finish(runs, data_dir, *SHORT, f"analysis=[{','.join(names)}]", *beside, *sizes, "seed=1", "name=beside")
    for name in names:
        assert (runs / f"runs/beside/figures/{name}.png").is_file()

    def rows(run, name):
        with Path(runs / f"runs/{run}/tables/{name}.csv").open() as file:
            return list(csv.DictReader(file))

    theirs = [row["value"] for row in rows("beside", "worst_case") if row["run"] == "sl_seed0"]
    assert theirs == [row["value"] for row in rows("several", "worst_case")]
    for name in ("curve", "curvature"):
        assert {row["model"] for row in rows("beside", name)} == {"sl (this run)", "sl_seed0"}


def test_a_run_that_cannot_be_shown_is_refused_before_anything_is_written(runs, launch):
    failed = launch(*SHORT, "analysis=distance", f"analysis.distance.runs=[{runs}/runs/one]", "name=x", cwd=runs)
    assert failed.returncode == 1 and "it has no tables/distance.csv" in failed.stderr
    assert not (runs / "runs/x").exists()

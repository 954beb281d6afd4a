"""Paired comparison: its statistics against known values, and which runs it compares, refuses and remarks upon."""

import csv
import json
import math
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from aerl.analyses import AnalysisContext
from aerl.config.targets import bind
from aerl.errors import UserError
from aerl.evaluation.statistics import mcnemar, paired_difference
from aerl.report.table import show
from aerl.tracking.results import ResultLog, read_results, write_summary

# --------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("cells", [(0, 0), (5, 0), (1, 7), (4, 4), (0, 1), (51, 50), (400, 520), (3000, 7000)])
def test_mcnemar_is_the_exact_binomial_test(cells):
    for b, c in (cells, cells[::-1]):
        expected = [binomtest(b, b + c, alternative=side).pvalue if b + c else 1.0 for side in ("two-sided", "greater")]
        found = [mcnemar(b, c), mcnemar(b, c, one_sided=True)]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_interval_by_hand():
    """n = 4, one sample in each cell: both proportions are 1/2, phi is 0, and the rest is Pythagoras."""
    z2 = 1.959963984540054**2
    half = math.sqrt(0.25 / 4 + z2 / 64) * math.sqrt(z2) / (1 + z2 / 4)
    low, high = paired_difference(1, 1, 1, 1)
    assert (low, high) == pytest.approx((-math.sqrt(2) * half, math.sqrt(2) * half))


def test_the_interval_of_a_published_table():
    """Airway hyper-responsiveness, 21 children: 1, 1, 7, 12. Fagerland, Lydersen, Laake, Stat. Med. 33 (2014)."""
    low, high = paired_difference(1, 1, 7, 12)
    assert (round(low, 3), round(high, 3)) == (-0.507, -0.026)


CELLS = st.tuples(*[st.integers(0, 400)] * 4).filter(any)


@settings(max_examples=200, deadline=None)
@given(CELLS)
def test_the_interval_holds_the_difference_and_turns_with_the_models(cells):
    both, b, c, neither = cells
    low, high = paired_difference(both, b, c, neither)
    assert -1 <= low <= (b - c) / sum(cells) <= high <= 1
    assert low < high
    assert paired_difference(both, c, b, neither) == pytest.approx((-high, -low))
    assert paired_difference(neither, c, b, both) == pytest.approx((-high, -low))  # of the error rates


@pytest.mark.parametrize("cells", [(0.5, 0.1, 0.2, 0.2), (0.8, 0.05, 0.05, 0.1), (0.1, 0.02, 0.3, 0.58)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(cells):
    """Exactly, over every table of 40 samples."""
    n, truth, covered = 40, cells[1] - cells[2], 0.0
    for both, b, c in product(range(n + 1), repeat=3):
        if both + b + c > n:
            continue
        low, high = paired_difference(both, b, c, n - both - b - c)
        if low <= truth <= high:
            counts = (both, b, c, n - both - b - c)
            ways = math.factorial(n) // math.prod(map(math.factorial, counts))
            covered += ways * math.prod(p**k for p, k in zip(cells, counts, strict=True))
    assert 0.93 < covered < 0.99


def test_impossible_counts_are_refused():
    for call in (lambda: mcnemar(-1, 2), lambda: paired_difference(0, 0, 0, 0)):
        with pytest.raises(ValueError):
            call()


# ----------------------------------------------------------------------------------------------- runs

LABEL = np.array([0, 1, 2, 0, 1, 2])
CLEAN = np.array([0, 1, 2, 0, 1, 0])  # the last is wrong
THREAT = {"norm": "L2", "eps": 1.0}


def outcomes(**pred: list[int]) -> dict[str, np.ndarray]:
    arrays = {"label": LABEL, "clean_pred": CLEAN, "index": np.arange(6) * 3}
    return arrays | {f"{name}_pred": np.array(values) for name, values in pred.items()}


def run_folder(path, arrays, *, status="finished", dataset="digits", attacks=None, settings=None, policy="argmax"):
    """A run's folder as a run leaves it, as far as a comparison reads it."""
    path.mkdir()
    if attacks is None:
        attacks = {name.removesuffix("_pred"): {**THREAT, "of": name.removesuffix("_pred")} for name in arrays
                   if name.endswith("_pred") and name != "clean_pred"}  # fmt: skip
    write_summary(path, {"status": status, "dataset": dataset, "attacks": attacks})
    (path / "config.yaml").write_text(yaml.safe_dump({"attack": settings or {}, "evaluation": {"policy": policy}}))
    np.savez(path / "outcomes.npz", **arrays)
    return attacks


@pytest.fixture
def against(tmp_path, hardware, monkeypatch):
    """`against(ours, "there")` compares a run of outcomes `ours` with others; returns what it saved and logged."""
    monkeypatch.chdir(tmp_path)

    def run(ours, *others, **kwargs):
        folder = tmp_path / "here"
        attacks = run_folder(folder, ours, **kwargs)
        saved = {}
        context = AnalysisContext(
            model=torch.nn.Identity(), images=torch.zeros(6, 1, 2, 2), labels=torch.from_numpy(LABEL),
            class_names=("a", "b", "c"), outcomes=ours, adversarial={}, attacks=attacks,
            figures=folder / "figures", norm="L2", eps=1.0, seed=0, trainer="sl", hardware=hardware, batch_size=4,
            log=ResultLog(folder, dict.fromkeys(("run_id", "dataset", "model", "trainer"), "x") | {"seed": 0}),
            save=lambda **news: saved.update(news),
        )  # fmt: skip
        spec = {"_target_": "aerl.analyses.compare.Compare", "runs": list(others)}
        results = bind(spec, "analysis.compare")()(context)
        return saved.get("comparisons"), results

    return run


def test_every_row_by_hand(against, tmp_path, capsys):
    ours = outcomes(fgsm=[0, 1, 2, 0, 0, 2], pgd=[0, 1, 2, 1, 1, 2])  # the last was wrong before the attack
    theirs = outcomes(fgsm=[0, 1, 0, 1, 0, 0], pgd=[0, 2, 2, 0, 1, 0], square=[0] * 6)
    run_folder(tmp_path / "there", theirs)
    comparisons, results = against(ours, "there")
    rows = comparisons["there"]["rows"]
    assert list(rows) == ["clean", "fgsm", "pgd", "worst_case"] and comparisons["there"]["warnings"] == []
    counts = {name: (row["accuracy"], row["other_accuracy"], row["b"], row["c"]) for name, row in rows.items()}
    assert counts == {
        "clean": (5 / 6, 5 / 6, 0, 0),
        "fgsm": (4 / 6, 2 / 6, 2, 0),
        "pgd": (4 / 6, 4 / 6, 1, 1),
        "worst_case": (3 / 6, 1 / 6, 2, 0),
    }
    assert rows["fgsm"]["difference"] == 2 / 6 and rows["fgsm"]["p"] == 0.5
    assert (rows["fgsm"]["low"], rows["fgsm"]["high"]) == paired_difference(2, 2, 0, 2)
    with (tmp_path / "here/tables/compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["run"], row["attack"], int(row["b"])) for row in table] == [
        ("there", name, row["b"]) for name, row in rows.items()
    ]
    lines = read_results(tmp_path / "here/results.jsonl")
    assert lines == results
    (line,) = [r for r in lines if r.metric == "robust_accuracy_difference" and r.attack == "fgsm"]
    assert (line.value, line.source, line.norm, line.eps, line.n) == (2 / 6, "there", "L2", 1.0, 6)
    assert {r.metric for r in lines} == {
        f"{part}_{what}" for part in ("clean", "robust", "worst_case") for what in ("accuracy_difference", "mcnemar_p")
    }  # fmt: skip
    identity = {"dataset": "digits", "model": "cnn", "trainer": "sl", "seed": 0, "folder": "r"}
    show({"status": "finished", **identity, "comparisons": comparisons})
    text = capsys.readouterr().out
    assert "compared with there" in text
    assert "worst case" in text and "+33.3 %" in text and max(map(len, text.splitlines())) <= 80


def test_the_worst_case_is_of_shared_attacks_that_count(against, tmp_path):
    ours = outcomes(big=[1, 1, 1, 1, 0, 0], pgd=[0, 1, 2, 0, 1, 0], fgsm=[0, 1, 2, 0, 0, 0], dead=[0] * 6, late=[0] * 6)
    theirs = ours | outcomes(fgsm=[0, 0, 0, 0, 0, 0])
    here = {name: {**THREAT, "of": name, "counts": True} for name in ("big", "pgd", "fgsm", "dead", "late")}
    here["big"] |= {"eps": 9.0, "counts": False}
    here["fgsm"]["alone"] = False  # it got the survivors of pgd, in both runs
    there = json.loads(json.dumps(here))
    there["late"]["alone"] = False
    here["dead"]["warnings"] = ["not run: no gradient"]
    run_folder(tmp_path / "there", theirs, attacks=there, policy="sample")
    comparisons, _ = against(ours, "there", attacks=here)
    rows = comparisons["there"]["rows"]
    assert list(rows) == ["clean", "big", "pgd", "fgsm", "worst_case"]
    assert (rows["worst_case"]["accuracy"], rows["worst_case"]["other_accuracy"]) == (4 / 6, 2 / 6)
    assert comparisons["there"]["warnings"] == [
        "dead is not compared: not run here, L2 eps 1 there",
        "late is not compared: L2 eps 1 here, L2 eps 1 on the survivors of pgd fgsm dead there",
        "compared by the likeliest class, although evaluation.policy is sample",
    ]


def test_attacks_that_are_not_the_same_are_reported(against, tmp_path):
    ours = outcomes(fgsm=[0] * 6, pgd=[0] * 6)
    there = {"fgsm": {"norm": "L2", "eps": 0.5}, "pgd": THREAT}
    run_folder(tmp_path / "there", ours, attacks=there, settings={"pgd": {"steps": 10, "eps": 1.0}})
    comparisons, _ = against(ours, "there", settings={"pgd": {"steps": 100, "eps": 1.0}})
    assert list(comparisons["there"]["rows"]) == ["clean", "pgd", "worst_case"]
    assert comparisons["there"]["warnings"] == [
        "fgsm is not compared: L2 eps 1 here, L2 eps 0.5 there",
        "pgd is not the same attack: steps is 100 here, 10 there",
    ]


@pytest.mark.parametrize(("change", "reason"), [
    ({"label": LABEL[::-1]}, "other samples than this run (their labels differ)"),
    ({"index": np.arange(6)}, "other samples than this run (their places in the test set differ)"),
    ({"label": LABEL[:5]}, "5 samples, this run 6; use the same evaluation.samples"),
    ({"label": np.array(["0", None], dtype=object)}, "there/outcomes.npz: cannot be read"),
    ({"dataset": "cifar10"}, "runs=there: is of dataset cifar10, this run of digits"),
])  # fmt: skip
def test_other_samples_are_refused(against, tmp_path, change, reason):
    dataset = change.pop("dataset", "digits")
    run_folder(tmp_path / "there", outcomes(pgd=[0] * 6) | change, dataset=dataset)
    with pytest.raises(UserError) as error:
        against(outcomes(pgd=[0] * 6), "there")
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("run", "reason"), [
    ("running", "must be finished; it is running"), ("bare", "must have an outcomes.npz"),
    ("empty", "must be a run folder"), ("nowhere", "must be a run folder"),
])  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused_before_anything_else(tmp_path, monkeypatch, run, reason):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "running", outcomes(pgd=[0] * 6), status="running")
    run_folder(tmp_path / "bare", outcomes(pgd=[0] * 6))
    (tmp_path / "bare/outcomes.npz").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        bind({"_target_": "aerl.analyses.compare.Compare", "runs": [run]}, "analysis.compare")
    assert str(error.value).startswith(f"analysis.compare.runs.0={run}: {reason}")


def test_two_runs_of_the_command_line(launch, tmp_path):
    words = ("trainer.epochs=1", "attack=fgsm", "logger=none", "evaluation.samples=30", "+model.net.hidden=8")
    assert launch(*words, "analysis=none", "name=one").returncode == 0
    done = launch(*words, "seed=1", "name=two", "analysis=compare", "analysis.compare.runs=['runs/one']")
    assert done.returncode == 0, done.stderr
    (comparison,) = json.loads((tmp_path / "runs/two/summary.json").read_text())["comparisons"].values()
    clean = [
        json.loads((tmp_path / f"runs/{name}/summary.json").read_text())["clean_accuracy"]["value"]
        for name in ("two", "one")
    ]
    assert comparison["rows"]["clean"]["difference"] == pytest.approx(clean[0] - clean[1])
    assert "compared with runs/one" in done.stdout
    assert done.stdout.index("compared with runs/one") > done.stdout.index("worst case")
    assert (tmp_path / "runs/two/tables/compare.csv").read_text().count("\n") == 4

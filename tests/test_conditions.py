"""Conditions next to each other, their waterfall, and judging without the normalisation of the training."""

import csv
from pathlib import Path

import numpy as np
import pytest

from aerl.evaluation.statistics import crossed_difference, mean_difference, paired_difference
from tests.runs import finish, summary_of

ATTACKS = (
    "attack=[pgd_paper,fgsm]",
    "attack.pgd_paper.steps=5",
    "eps=0.5",
    "evaluation.samples=60",
    "analysis=none",
    "logger=none",
)


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """sl and rl, each also judged without its normalisation, and the two analysed."""
    place = tmp_path_factory.mktemp("conditions")
    finish(place, data_dir, "-m", "trainer=sl,rl", "trainer.epochs=2", *ATTACKS)
    folders = [str(next(place.glob(f"runs/digits/alicnn/{trainer}/*/seed0"))) for trainer in ("sl", "rl")]
    words = ("trainer=none", f"checkpoint={','.join(folders)}", "evaluation.withhold_normalization=true")
    finish(place, data_dir, "-m", *words, *ATTACKS)
    judged = {summary_of(path)["origin"]["trainer"]: str(path) for path in place.glob("runs/digits/alicnn/none/*/*")}
    withheld = [judged["sl"], judged["rl"]]
    steps = (
        "[{label:a,trainer:sl},{label:b,trainer:rl},{label:c,trainer:rl,attack:pgd_paper},"
        "{label:d,trainer:rl,attack:pgd_paper,withheld:true}]"
    )
    finish(
        place, data_dir, "trainer=none", f"checkpoint={folders[0]}", "attack=none", "analysis=conditions",
        "logger=none",
        f"analysis.conditions.runs=[{','.join(withheld)}]", f"analysis.conditions.steps={steps}", "name=all",
        "analysis.conditions.against=[[rl,sl]]",
    )  # fmt: skip
    return place, folders, withheld


def test_the_waterfall_adds_up_to_what_the_runs_measured(runs):
    place, folders, withheld = runs
    sl, rl, lost = (summary_of(Path(folder)) for folder in (*folders, withheld[1]))
    expected = [
        sl["worst_case_accuracy"]["value"],
        rl["worst_case_accuracy"]["value"],
        rl["attacks"]["pgd_paper"]["robust_accuracy"]["value"],
        lost["attacks"]["pgd_paper"]["robust_accuracy"]["value"],
    ]
    rows = table(place / "runs/all/tables/waterfall.csv")
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(expected)
    changes = [float(row["difference"]) for row in rows[1:]]
    assert changes == pytest.approx(np.diff(expected).tolist())
    for row in rows[1:]:
        assert float(row["difference_low"]) <= float(row["difference"]) <= float(row["difference_high"])
    assert [row["trainer"] for row in table(place / "runs/all/tables/conditions.csv")] == ["sl", "sl", "rl", "rl"]
    effects = {row["attack"]: float(row["difference"]) for row in table(place / "runs/all/tables/effects.csv")}
    assert effects["worst_case"] == pytest.approx(changes[0])
    assert all((place / f"runs/all/figures/{name}.png").is_file() for name in ("conditions", "waterfall", "effects"))


def test_a_run_judged_without_its_normalisation_says_so_and_is_verified(runs, data_dir):
    from aerl.verify import verify

    _, folders, withheld = runs
    page = Path(withheld[0], "report.html").read_text()
    summary = summary_of(Path(withheld[0]))
    assert "not the model's robustness" in page.replace("&#39;", "'") and "without its normalisation" in page
    assert any("withhold_normalization" in doubt for doubt in summary["doubts"])
    assert summary["clean_accuracy"]["value"] != summary_of(Path(folders[0]))["clean_accuracy"]["value"]
    checks = {check.name: check.faults for check in verify(Path(withheld[0]))}
    assert "evidence" in checks and not any(checks.values())


def test_a_step_without_a_run_names_those_there_are(runs, data_dir):
    place, folders, _ = runs
    done = finish(
        place, data_dir, "trainer=none", f"checkpoint={folders[0]}", "attack=none", "analysis=conditions",
        "logger=none",
        f"analysis.conditions.runs=[{folders[0]}]", "analysis.conditions.steps=[{label:b,trainer:gce}]", "name=none",
    )  # fmt: skip
    assert "steps: b: no run of gce; known: sl" in done.stderr


def test_differences_are_paired_by_sample_and_for_one_model_by_seed():
    rng = np.random.default_rng(0)
    first = (rng.random((3, 400)) < rng.random((3, 1)) * 0.8).astype(float)
    second = first * (rng.random((3, 400)) < 0.9)
    paired = mean_difference(second, first, same_models=True)
    assert paired[0] == pytest.approx(second.mean() - first.mean()) and -0.12 < paired[1] < paired[2] < 0
    crossed = mean_difference(second, first, same_models=False)
    assert crossed == crossed_difference(second, first)[:3] and crossed[1] < paired[1]
    here, there = second[0] > 0, first[0] > 0
    cells = [int(cell.sum()) for cell in (here & there, here & ~there, ~here & there, ~here & ~there)]
    assert mean_difference(second[:1], first[:1], same_models=True)[1:] == paired_difference(*cells)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["causes", "boundedness"])
def test_the_sweeps_end_with_their_figure(tmp_path, data_dir, sweep):
    """All jobs on a few digits, with two seeds; causes goes on to causes_withheld."""
    attacks = "[pgd_paper,pgd_paper_box,pgd_ce_last,pgd_ce,pgd]" if sweep == "causes" else "[pgd_paper,pgd_ce,pgd]"
    done = finish(
        tmp_path, data_dir, f"multirun_sweeps={sweep}", "dataset=digits", "trainer.epochs=3", "seed=0,1", "logger=none",
        "dataset.train_samples=200", "evaluation.samples=20", f"attack={attacks}",
    )  # fmt: skip
    assert "0 failed" in done.stdout
    figure = {"causes": "waterfall", "boundedness": "conditions"}[sweep]
    (found,) = tmp_path.glob(f"runs/multirun/*/{sweep}/tables/{figure}.csv")
    rows = table(found)
    assert len(rows) == {"causes": 9, "boundedness": 15}[sweep] and {row["seeds"] for row in rows} == {"2"}

"""Accuracy under corruptions, from files whose errors are known by construction, and mCE by hand."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from aerl.analyses import AnalysisContext
from aerl.analyses.corruptions import Corruptions, mce
from aerl.errors import UserError
from aerl.tracking.results import ResultLog, read_results

N = 40
WRONG = {"fog": [0, 2, 4, 8, 20], "snow": [4, 4, 4, 4, 4]}  # of 40 images, by severity


class Bright(nn.Module):
    """Class 1 for an image that is brighter than a threshold."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        level = x.mean((1, 2, 3)) - self.threshold
        return torch.stack([-level, level], 1)


def stored(folder, shape=(4, 4, 1)):
    """The files of CIFAR-10-C: dark and bright images in turn, of which some have the other's brightness."""
    labels = np.arange(N) % 2
    for name, counts in WRONG.items():
        parts = []
        for wrong in counts:
            shown = np.where(np.arange(N) < wrong, 1 - labels, labels)
            parts.append(np.broadcast_to(np.where(shown, 200, 50)[:, None, None, None], (N, *shape)))
        np.save(folder / f"{name}.npy", np.concatenate(parts).astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return folder


@pytest.fixture
def context(tmp_path, hardware):
    saved, identity = {}, {"run_id": "r", "seed": 0, "dataset": "d", "model": "m", "trainer": "sl"}
    context = AnalysisContext(
        model=Bright(), images=torch.zeros(3, 1, 4, 4, dtype=torch.uint8), labels=torch.zeros(3, dtype=torch.long),
        class_names=("dark", "bright"), outcomes={}, adversarial={}, attacks={}, figures=tmp_path / "figures",
        log=ResultLog(tmp_path, identity), norm="L2", eps=0.5, seed=0, trainer="sl", hardware=hardware, batch_size=7,
        save=saved.update,
    )  # fmt: skip
    return SimpleNamespace(context=context, saved=saved, folder=tmp_path)


def analysis(folder, load=lambda runs, key: {}, **settings):
    return Corruptions(folder=str(folder), load=load, **settings)


def test_each_cell_and_the_mean_error_are_those_of_the_files(context):
    analysis(stored(context.folder))(context.context)
    with (context.folder / "tables/corruptions.csv").open() as file:
        cells = {(r["corruption"], int(r["severity"])): float(r["accuracy"]) for r in csv.DictReader(file)}
    assert cells == {(n, s + 1): 1 - wrong / N for n, counts in WRONG.items() for s, wrong in enumerate(counts)}
    (model,) = context.saved["corruptions"]["models"]
    assert model["mce"] == pytest.approx((34 + 20) / 400) and model["accuracy"] == pytest.approx(1 - 54 / 400)
    logged = {r.attack: r.value for r in read_results(context.folder / "results.jsonl")}
    assert logged == {"fog": pytest.approx(1 - 34 / 200), "snow": pytest.approx(0.9)}
    assert (context.folder / "figures/corruptions.png").stat().st_size > 10_000


def test_errors_relative_to_another_run(context):
    """A model that calls everything bright is wrong on half of the images of each cell."""
    other = {"other": Bright(0.0)}
    chosen = analysis(stored(context.folder), lambda runs, key: other, runs=["x"], relative_to="x", severities=[4, 5])
    chosen(context.context)
    own, theirs = context.saved["corruptions"]["models"]
    assert theirs["mce"] == 1 and theirs["accuracy"] == 0.5
    assert own["mce"] == pytest.approx(((8 + 20) / 40 + 8 / 40) / 2)


def test_mce_is_hendrycks_and_dietterichs():
    """Section 4.1: the errors are summed over the severities before they are divided, and then averaged."""
    ours, base = np.array([[0.1, 0.3], [0.2, 0.2]]), np.array([[0.2, 0.4], [0.4, 0.6]])
    assert mce(ours, base) == pytest.approx((0.4 / 0.6 + 0.4 / 1.0) / 2)
    assert mce(ours) == pytest.approx(0.2) and math.isnan(mce(np.zeros((1, 2)), np.zeros((1, 2))))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"severities": [3, 6]}, r"severities=\[6\]: expected 1 to 5"),
        ({"severities": []}, r"severities=\[\]: expected some of 1 to 5"),
        ({"names": ["rain"]}, r"names=\['rain'\]: not in .*; it has fog, snow"),
        ({"relative_to": "y"}, r"relative_to=y: expected one of analysis.corruptions.runs=\[\]"),
        ({"folder": "nowhere"}, "folder=nowhere: has no labels.npy"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, settings, line):
    with pytest.raises(UserError, match=line):
        analysis(**{"folder": stored(tmp_path)} | settings)


def test_images_of_another_shape_are_refused(context):
    with pytest.raises(UserError, match=r"fog.npy: uint8 \(200, 5, 4, 1\); expected uint8 \(200, 4, 4, 1\)"):
        analysis(stored(context.folder, (5, 4, 1)))(context.context)

"""FMN against closed forms and fixed-eps attacks, and the curve of accuracies that is read from its distances."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from aerl.analyses import AnalysisContext
from aerl.analyses.distance import curve, distance, half_width
from aerl.attacks import fmn, pgd
from aerl.tracking.results import ResultLog
from tests.nets import Linear, digits_net, images, noise_for, predictions, sizes, wrong


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_distance_of_a_linear_model_is_the_closed_form(norm):
    x = images(low=0.4, high=0.6)  # the box is far away
    model = Linear(4)
    y = predictions(model, x)
    x_adv = fmn(model, x, y, generator=noise_for(x), norm=norm, steps=200)
    assert wrong(model, x_adv, y).all()
    ratio = sizes(x_adv - x, norm) / model.distances(x, y, norm)
    assert ratio.min() > 0.999
    assert ratio.quantile(0.9) < 1.02 and ratio.max() < 1.5  # the likeliest wrong class may not be the nearest


@pytest.fixture(scope="module")
def digits():
    net, x, y = digits_net(10, 6, unseen=150)
    return net, x, y


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_in_the_box_smallest_first_and_the_same_in_every_batch(digits, norm):
    net, x, y = digits
    together = fmn(net, x, y, generator=noise_for(x), norm=norm)
    parts = zip(x.split(40), y.split(40), strict=True)
    alone = torch.cat([fmn(net, a, b, generator=noise_for(a), norm=norm) for a, b in parts])
    assert torch.allclose(together, alone, atol=1e-4)
    assert together.min() >= 0 and together.max() <= 1
    assert wrong(net, together, y).all()
    already = wrong(net, x, y)
    assert already.any() and torch.equal(together[already], x[already])
    limited = fmn(net, x, y, generator=noise_for(x), norm=norm, eps=0.1)
    far = sizes(together - x, norm) > 0.1
    assert torch.equal(limited[far], x[far]) and torch.equal(limited[~far], together[~far])


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_agrees_with_pgd_at_every_eps(digits, norm):
    net, x, y = digits
    distances = sizes(fmn(net, x, y, generator=noise_for(x), norm=norm, steps=200) - x, norm).numpy()
    largest = float(np.quantile(distances, 0.9))
    for eps in np.linspace(largest / 5, largest, 5).tolist():
        x_adv = pgd(net, x, y, generator=noise_for(x), norm=norm, eps=eps, restarts=3)
        accuracy = (~wrong(net, x_adv, y)).float().mean().item()
        assert abs(accuracy - curve(distances, eps)) < half_width(len(x)) / 2


def test_the_band_is_that_of_massart():
    assert half_width(1000) == pytest.approx(math.sqrt(math.log(40) / 2000))
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(400):  # the uniform distribution, whose accuracy at eps is 1 - eps
        found = np.sort(rng.random(100))
        steps = np.concatenate([1 - np.arange(1, 101) / 100 - (1 - found), 1 - np.arange(100) / 100 - (1 - found)])
        outside += np.abs(steps).max() > half_width(100)
    assert 0.01 < outside / 400 < 0.08


def test_as_close_as_the_reference_implementation(digits):
    adv_lib = pytest.importorskip("adv_lib.attacks", reason="needs adversarial-library")
    net, x, y = digits
    for norm, order in (("L2", 2), ("Linf", float("inf"))):
        theirs, ours = (
            adv_lib.fmn(net, x, y, norm=order, steps=100),
            fmn(net, x, y, generator=noise_for(x), norm=norm, steps=100),
        )
        found = wrong(net, theirs, y)  # in L2 its iterates often stop just before the boundary
        assert found.any() and wrong(net, ours, y)[found].all()
        assert sizes(ours - x, norm)[found].median() <= 1.02 * sizes(theirs - x, norm)[found].median()


def test_the_analysis_takes_the_smallest_distance_that_any_attack_found(digits, hardware, tmp_path):
    net, x, y = digits
    labels, pred = y.numpy(), predictions(net, x).numpy()
    right = pred == labels
    close = np.flatnonzero(right)[0]  # where an attack of the run claims a tiny perturbation
    size, fooled = np.full(len(y), 0.5, np.float32), labels.copy()
    size[close], fooled[close] = 1e-3, (labels[close] + 1) % 10
    found = {}
    identity = dict.fromkeys(("run_id", "dataset", "model", "trainer"), "") | {"seed": 0}
    context = AnalysisContext(
        model=net, images=(x * 255).round().byte(), labels=y, class_names=tuple("0123456789"),
        outcomes={"label": labels, "clean_pred": pred, "a_pred": fooled, "a_l2": size}, adversarial={},
        attacks={"a": {"of": "a", "counts": True, "norm": "L2", "eps": 0.5, "robust_accuracy": {"value": 0.9}}},
        figures=tmp_path / "figures", log=ResultLog(tmp_path, identity), norm="L2", eps=0.5, seed=0,
        trainer="sl", hardware=hardware, batch_size=40, save=found.update,
    )  # fmt: skip
    distance(context, steps=50)
    report = found["distance"]
    assert report["n"] == len(y) and report["found"] == 1.0 and report["band"] == half_width(len(y))
    accuracies = list(report["accuracy"].values())
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] < right.mean()
    table = pd.read_csv(next(tmp_path.rglob("distance.csv")), keep_default_na=False).set_index("row")
    assert (table.loc[~right, "distance"] == 0).all() and (table.loc[~right, "attack"] == "clean").all()
    assert table.loc[close, "attack"] == "a" and table.loc[close, "distance"] == pytest.approx(1e-3)
    assert report["median"] == pytest.approx(table["distance"].median())
    assert next(tmp_path.rglob("distance.png")).stat().st_size > 5_000

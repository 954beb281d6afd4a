"""The analyses against direct computation: a plain loop, the model itself, tables counted by hand."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerl.analyses import AnalysisContext, NotMade
from aerl.analyses.curvature import Curvature
from aerl.analyses.gradients import Dynamics, Gradients, gradient_dynamics
from aerl.analyses.landscape import Landscape, WeightLandscape, evaluate_grid, filter_normalised, plane
from aerl.analyses.outcomes import confusion, entropy, norms
from aerl.analyses.pictures import pictures
from aerl.analyses.training import Training
from aerl.attacks import SampleGenerator
from aerl.attacks.projections import clip, random_in_ball
from aerl.data import Split, subset, to_unit
from aerl.tracking.results import ResultLog, read_results


def net(seed=0, kinks=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU() if kinks else nn.Tanh(), nn.Flatten(), nn.Linear(96, 4)).eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (23, 1, 6, 6), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        return Split(x, net()(to_unit(x)).argmax(1))


@pytest.fixture
def context(tmp_path, hardware, images):
    """A context of the small network, with one attack in it that fooled the first two samples."""
    n, label = len(images), images.labels.numpy()
    pred = label.copy()
    pred[:2] = (label[:2] + 1) % 4
    attack = {
        "pred": pred, "p": np.full(n, 0.3), "confidence": np.linspace(0.4, 0.9, n),
        "entropy": np.linspace(0, 2, n), "l2": np.linspace(0.1, 0.9, n), "linf": np.linspace(0.1, 0.2, n),
    }  # fmt: skip
    clean = {"pred": label, "p": np.ones(n), "confidence": np.ones(n), "entropy": np.zeros(n)}
    outcomes = {"label": label, **{f"clean_{key}": value for key, value in clean.items()}}
    outcomes |= {f"pgd_{key}": value for key, value in attack.items()}
    saved = {}
    identity = {"run_id": "r", "seed": 0, "dataset": "d", "model": "m", "trainer": "sl"}
    made = AnalysisContext(
        model=net(), images=images.images, labels=images.labels, class_names=("a", "b", "c", "d"),
        outcomes=outcomes, adversarial={}, attacks={"pgd": {"norm": "L2", "eps": 1.0}},
        figures=tmp_path / "figures", log=ResultLog(tmp_path, identity), norm="L2", eps=0.5, seed=0,
        trainer="sl", hardware=hardware, batch_size=8, save=saved.update,
    )  # fmt: skip
    return made, saved, tmp_path


def rows_of(folder, name):
    with (folder / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_gradient_statistics_equal_those_of_a_plain_loop_over_single_samples(images, norm):
    """PGD, its gradients and their statistics once more, one sample at a time and in the textbook's words."""
    model, eps, steps = net(), 0.4, 6
    found = gradient_dynamics(model, images, norm=norm, eps=eps, steps=steps, batch_size=7)
    units = torch.zeros(steps, len(images), 36, dtype=torch.float64)
    for i, (image, y) in enumerate(zip(images.images, images.labels, strict=True)):
        x = to_unit(image[None])
        noise = SampleGenerator.for_images(x, 0, "gradients")
        point, before = clip(x, random_in_ball(x, norm, eps, noise), norm, eps), None
        for step in range(steps):
            point = point.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(point), y[None]), point)
            flat = g.flatten().double()
            assert found.norm[step, i] == pytest.approx(flat.norm().item(), rel=1e-6, abs=1e-6)
            units[step, i] = flat / flat.norm()
            if before is not None:
                cosine = (flat @ before / flat.norm() / before.norm()).item()
                assert found.cosine[step, i] == pytest.approx(cosine, abs=1e-6)
                same = ((flat > 0) == (before > 0)).double().mean().item()
                assert found.sign_agreement[step, i] == pytest.approx(same, abs=1e-6)
            before = flat
            direction = g.sign() if norm == "Linf" else g / g.norm()
            point = clip(x, point.detach() + eps / 10 * direction - x, norm, eps)
    variance = 1 - units.mean(1).norm(dim=1)
    np.testing.assert_allclose(found.curves()["direction_variance"][0], variance, atol=1e-6)
    assert found.cosine[0].isnan().all() and found.sign_agreement[0].isnan().all()


def test_a_gradient_that_is_zero_is_counted_and_left_out_of_every_mean(images):
    class Flat(nn.Module):
        """No gradient for the images whose first pixel is dark."""

        def forward(self, x):
            lit = (x[:, :1, 0, 0] > 0.5).float()
            return torch.cat([x.mean((1, 2, 3))[:, None] * lit, torch.zeros_like(lit)], 1)

    dark = images.images[:, 0, 0, 0] <= 127
    labels = torch.zeros(len(images), dtype=torch.long)
    found = gradient_dynamics(Flat(), Split(images.images, labels), norm="Linf", eps=1e-3, steps=3)
    assert 0 < dark.sum() < len(dark)
    assert ((found.norm == 0) == dark).all()
    assert (found.cosine[1:].isnan() == dark).all()
    curves = found.curves()
    assert np.isfinite(curves["norm"]).all()
    np.testing.assert_allclose(curves["direction_variance"][0], 0, atol=1e-6)  # all that are alive point one way


def test_the_intervals_of_the_curves_hold_the_truth_about_as_often_as_they_say():
    torch.manual_seed(0)
    hits = {"cosine": 0, "direction_variance": 0}
    n, dimensions, trials = 80, 3, 200
    mean = torch.tensor([0.8, 0.0, 0.0])
    draw = F.normalize(mean + 0.7 * torch.randn(200_000, dimensions), dim=1)
    truth = 1 - draw.mean(0).norm()
    for _ in range(trials):
        units = F.normalize(mean + 0.7 * torch.randn(n, dimensions), dim=1)
        cosine = torch.randn(1, n)
        group = torch.arange(n) % 8
        sums = torch.zeros(8, 1, dimensions)
        sums[:, 0].index_add_(0, group, units)
        counts = torch.full((8, 1), n / 8)
        curves = Dynamics(torch.ones(1, n), cosine, cosine, sums, counts).curves()
        for name, true in (("cosine", 0.0), ("direction_variance", float(truth))):
            _, low, high = curves[name][:, 0]
            hits[name] += low <= true <= high
    assert all(0.88 <= hit / trials <= 1.0 for hit in hits.values()), hits


def test_gradients_next_to_another_run(context):
    given, saved, folder = context
    other = net(1)
    analysis = Gradients(runs=["elsewhere"], load=lambda runs, key: {"rl_seed1": other}, steps=4, samples=20)
    results = analysis(given)
    table = rows_of(folder, "gradients")
    assert [row["model"] for row in table] == ["sl (this run)"] * 4 + ["rl_seed1"] * 4
    assert table[0]["cosine"] == "nan" and float(table[1]["cosine_low"]) <= float(table[1]["cosine"])
    assert saved["gradients"]["n"] == 20
    assert {result.metric for result in results} >= {"gradient_cosine", "gradient_zero_share"}
    assert (folder / "figures/gradients.pdf").read_bytes().startswith(b"%PDF")


# --- landscape --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_centre_and_adversarial_point_of_the_landscape_are_the_models_own(images, norm):
    model, x, y = net(), to_unit(images.images[:1])[0], images.labels[0]
    found = plane(model, x, y, norm=norm, eps=0.5, resolution=61, batch_size=50)
    with torch.no_grad():
        loss = F.cross_entropy(model(x[None]), y[None]).item()
    assert found.loss_at[0] == pytest.approx(loss, abs=1e-6) == found.loss[30, 30]
    assert found.classes[30, 30] == int(y)
    assert 0 < found.adversarial <= 1.001 and found.loss_at[1] > loss
    # Along the adversarial direction the map agrees with the loss at the adversarial example.
    along = np.interp(found.adversarial, found.axis, found.loss[30])
    assert along == pytest.approx(found.loss_at[1], abs=0.05)


@pytest.mark.parametrize("n", [1, 2, 17])
def test_every_point_of_the_grid_is_evaluated_once_with_b_along_the_rows(n):
    axis, sizes = torch.linspace(-2, 3, n), []
    found = evaluate_grid(lambda points: sizes.append(len(points)) or points.clone(), axis, batch_size=5)
    b, a = torch.meshgrid(axis, axis, indexing="ij")
    assert torch.equal(found, torch.stack([a, b], -1))
    assert max(sizes) <= 5 and sum(sizes) == n * n


def test_landscape_of_two_runs_has_one_plane_for_each_image_and_model(context):
    given, saved, folder = context
    analysis = Landscape(runs=["there"], load=lambda runs, key: {"rl_seed0": net(1)}, samples=2, resolution=20)
    analysis(given)
    with np.load(folder / "figures/landscape.npz") as file:
        assert {key for key in file.files if key.endswith("_loss")} == {
            f"{model}_{image}_loss" for model in ("sl", "rl_seed0") for image in (0, 1)
        }
        assert file["sl_0_loss"].shape == (20, 20)
    assert len(saved["landscape"]) == 4
    assert (folder / "figures/landscape.png").stat().st_size > 5_000


def test_nothing_to_show_is_reported(context):
    given, _, _ = context
    wrong = replace(given, outcomes={**given.outcomes, "clean_pred": (given.outcomes["label"] + 1) % 4})
    none = replace(given, attacks={})
    for call in (
        Landscape(load=lambda runs, key: {}),
        Gradients(load=lambda runs, key: {}),
        Curvature(load=lambda runs, key: {}),
    ):
        with pytest.raises(NotMade, match="no sample is classified correctly"):
            call(wrong)
    with pytest.raises(NotMade, match="no attack fooled a sample"):
        norms(none)
    entropy(none)  # of the clean images alone
    confusion(none)


# --- curvature, weights -----------------------------------------------------------------------------------


def test_curvature_of_a_quadratic_is_its_second_derivative(context):
    """margin = z_1 - z_0 = -(s * |x - c|^2): gradient -2 s (x - c), whose change along itself is 2 s."""
    given, saved, _ = context

    class Bowl(nn.Module):
        def forward(self, x):
            squared = 1.5 * (x - 2.0).flatten(1).square().sum(1)
            return torch.stack([squared, torch.zeros_like(squared)], 1)

    zeros = np.zeros(len(given.images), int)
    bowl = replace(
        given, model=Bowl(), labels=torch.zeros(len(zeros), dtype=torch.long),
        outcomes={"label": zeros, "clean_pred": zeros},
    )  # fmt: skip
    Curvature(load=lambda runs, key: {}, loss="margin", samples=20)(bowl)
    assert saved["curvature"]["curvature_median"] == pytest.approx(3.0, rel=1e-2)
    assert saved["curvature"]["gradient_zero"] == 0
    length = (3 * (to_unit(bowl.images) - 2.0)).flatten(1).norm(dim=1)
    assert length.min() < saved["curvature"]["gradient_norm_median"] < length.max()


def test_weight_directions_have_the_filters_lengths_and_the_centre_is_the_trained_model(context):
    given, _, folder = context
    direction = filter_normalised(given.model, torch.Generator().manual_seed(0))
    for name, weight in given.model.named_parameters():
        if weight.dim() > 1:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
        else:
            assert not direction[name].any()
    before = {name: weight.clone() for name, weight in given.model.state_dict().items()}
    WeightLandscape(load=lambda runs, key: {}, samples=20, resolution=3)(given)
    with np.load(folder / "figures/weight_landscape.npz") as file:
        loss = file["loss"]
    chosen = subset(Split(given.images, given.labels), 20)
    with torch.no_grad():
        expected = F.cross_entropy(given.model(to_unit(chosen.images)), chosen.labels).item()
    assert loss[1, 1] == pytest.approx(expected, rel=1e-5) and len(set(loss.flatten().tolist())) == 9
    assert all(torch.equal(before[name], weight) for name, weight in given.model.state_dict().items())


# --- what is read from the outcomes -----------------------------------------------------------------------


def test_entropy_confusion_and_norms_counted_by_hand(context):
    given, _, folder = context
    n, label = len(given.images), given.outcomes["label"]
    entropy(given)
    table = {(row["images"], row["answer"]): row for row in rows_of(folder, "entropy")}
    assert [int(row["n"]) for row in table.values()] == [n, 0, n - 2, 2]
    bits = np.linspace(0, 2, n)
    assert float(table["pgd", "wrong"]["entropy_mean"]) == pytest.approx(bits[:2].mean())
    assert float(table["pgd", "right"]["entropy_sd"]) == pytest.approx(bits[2:].std(ddof=1))
    assert math.isnan(float(table["clean", "wrong"]["confidence_mean"]))
    confusion(given)
    counts = {(row["images"], row["true"], row["predicted"]): int(row["n"]) for row in rows_of(folder, "confusion")}
    assert sum(c for (images, _, _), c in counts.items() if images == "clean") == n
    first = "abcd"[label[0]], "abcd"[(label[0] + 1) % 4]
    assert counts["under attack", *first] >= 1
    assert sum(c for (images, t, p), c in counts.items() if images == "under attack" and t != p) == 2
    norms(given)
    (l2, linf) = rows_of(folder, "norms")
    assert (l2["norm"], l2["n"], linf["norm"]) == ("l2", "2", "linf")
    assert float(l2["median"]) == pytest.approx(np.linspace(0.1, 0.9, n)[:2].mean())
    metrics = {result.metric for result in read_results(folder / "results.jsonl")}
    assert {"entropy_right", "confidence_wrong", "median_l2"} <= metrics


def test_predictions_outside_the_classes_are_wrong_and_named(context):
    given, _, folder = context
    outcomes = {key: value.copy() for key, value in given.outcomes.items()}
    outcomes["pgd_pred"][:3] = (-1, 4, 7)  # not finite, and a model with more outputs than there are classes
    for key in ("entropy", "confidence"):
        outcomes[f"pgd_{key}"][0] = np.nan
    given = replace(given, outcomes=outcomes)
    confusion(given)
    found = [row for row in rows_of(folder, "confusion") if row["images"] == "under attack"]
    other = {row["predicted"]: int(row["n"]) for row in found if row["predicted"] not in "abcd"}
    assert other == {"not finite": 1, "4": 1, "7": 1}
    assert sum(int(row["n"]) for row in found) == len(given.images)
    entropy(given)
    table = {(row["images"], row["answer"]): row for row in rows_of(folder, "entropy")}
    assert [int(table["pgd", answer]["n"]) for answer in ("right", "wrong")] == [len(given.images) - 3, 2]
    assert math.isfinite(float(table["pgd", "wrong"]["entropy_mean"]))
    example = given.images[:4].float() / 255
    pictures(replace(given, adversarial={"pgd": example}))
    assert (folder / "figures/pictures.png").is_file()


def test_norms_of_an_attack_on_survivors_are_of_those_it_fooled_itself(context):
    given, _, folder = context
    later = {key.replace("pgd", "square"): value.copy() for key, value in given.outcomes.items() if "pgd" in key}
    later["square_pred"][2] = (later["square_pred"][2] + 1) % 4
    attacks = {**given.attacks, "square": {"norm": "L2", "eps": 1.0, "alone": False}}
    norms(replace(given, outcomes={**given.outcomes, **later}, attacks=attacks))
    assert [(row["attack"], row["n"]) for row in rows_of(folder, "norms")] == [
        ("pgd", "2"), ("pgd", "2"), ("square", "1"), ("square", "1"),
    ]  # fmt: skip


def test_the_curves_of_a_training(context):
    made, _, folder = context
    with pytest.raises(NotMade, match="did not train"):
        made.log.log({"clean_accuracy": 0.5}, n=4, split="test")
        Training()(made)
    for epoch in (1, 2, 3):
        made.log.log({"loss": 1 / epoch, "accuracy": 0.2 * epoch, "grad_norm": 2.0}, n=9, split="train", step=epoch)
        adversarial = {"adversarial_accuracy": 0.1} if epoch == 3 else {}
        made.log.log({"accuracy": 0.1 * epoch, "loss": 2.0} | adversarial, n=4, split="val", step=epoch)
    Training()(made)
    rows = list(csv.DictReader((folder / "tables/training.csv").open()))
    assert [float(row["train_accuracy"]) for row in rows] == pytest.approx([0.2, 0.4, 0.6])
    assert [row["val_adversarial_accuracy"] for row in rows] == ["", "", "0.1"] and rows[2]["epoch"] == "3"
    assert (folder / "figures/training.png").is_file()

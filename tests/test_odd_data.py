"""Odd data and models through the default suite, the audit and the other analyses: each ends, or refuses in a line."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from aerl.analyses import AnalysisContext, NotMade
from aerl.analyses.curvature import Curvature
from aerl.analyses.curve import Curve
from aerl.analyses.gradients import Gradients
from aerl.analyses.landscape import Landscape, WeightLandscape
from aerl.analyses.masking import masking
from aerl.analyses.outcomes import confusion, entropy, norms
from aerl.analyses.pictures import pictures
from aerl.attacks import AutoAttack, collect_warnings, pgd
from aerl.data import Split
from aerl.errors import UserError
from aerl.evaluation import evaluate
from aerl.evaluation.outcomes import accuracy, check_within, so_far
from aerl.tracking.results import ResultLog

EPS = {"L2": 0.5, "Linf": 0.05}
ALONE = {"load": lambda runs, key: {}}
OTHERS = {
    "pictures": pictures,
    "entropy": entropy,
    "confusion": confusion,
    "norms": norms,
    "curvature": Curvature(load=lambda runs, key: {}),
    "gradients": Gradients(steps=3, **ALONE),
    "curve": Curve(load=lambda runs, key: {}, samples=5, steps=3),
    "landscape": Landscape(samples=2, resolution=9, steps=3, **ALONE),
    "weight_landscape": WeightLandscape(resolution=3, **ALONE),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few of AutoAttack's iterations."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.fab_base import FABAttack
    from pyautoattack.square import SquareAttack

    for kind, settings in (
        (APGDAttack, {"n_iter": 5}),
        (FABAttack, {"n_iter": 3}),
        (SquareAttack, {"n_queries": 5}),
    ):
        whole = kind.attack_single_run

        def attack_single_run(self, *args, whole=whole, settings=settings, **kwargs):
            vars(self).update(settings)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(kind, "attack_single_run", attack_single_run)


class Net(nn.Module):
    """Logits of (C, H, W) images, `far(x, logits)` of them."""

    def __init__(self, channels, classes, far=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.far = nn.Linear(16 * channels, classes), far

    def forward(self, x):
        logits = 4 * self.linear(nn.functional.adaptive_avg_pool2d(x - 0.5, 4).flatten(1))
        return logits if self.far is None else self.far(x, logits)


class Case:
    """A network and images of its own classes (all but the last, if there are several); the suite run on them."""

    def __init__(self, folder, hardware, *, classes, shape, n, norm="L2", eps=None, far=None, batch_size=3):
        x = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        self.model = Net(shape[0], classes, far).eval()
        with torch.no_grad():
            y = Net(shape[0], classes)(x / 255).argmax(1)
        if n > 1:
            y[-1] = (y[-1] + 1) % classes
        self.split, self.hardware, self.eps = Split(x, y), hardware, EPS[norm] if eps is None else eps
        self.saved, self.warnings = {}, []
        identity = {"run_id": "r", "seed": 0, "dataset": "d", "model": "m", "trainer": "sl"}
        self.context = partial(
            AnalysisContext, model=self.model, images=x, labels=y, class_names=tuple(map(str, range(classes))),
            figures=folder / "figures", log=ResultLog(folder, identity), norm=norm, eps=self.eps, seed=0,
            trainer="sl", hardware=hardware, batch_size=batch_size, save=self.saved.update,
        )  # fmt: skip
        self.norm, self.batch_size = norm, batch_size

    def attack(self):
        """The default suite, on the survivors; returns an AnalysisContext of its outcomes."""
        given = {"norm": self.norm, "eps": self.eps}
        suite = {
            "pgd": partial(pgd, steps=5, **given),
            "pgd_targeted": partial(pgd, steps=5, loss="margin", targeted=True, restarts=3, **given),
            "autoattack": AutoAttack(queries=5, **given),
        }
        labels = self.split.labels.numpy()
        clean = evaluate.predict(self.model, self.split, self.hardware, self.batch_size)
        outcomes = {"label": labels, **clean.columns("clean")}
        examples, attacks = {}, {}
        for name, attack in suite.items():
            before = so_far(outcomes, clean, list(attacks))
            with collect_warnings() as warnings:
                (found,) = evaluate.run_attack(
                    attack, self.model, self.split, before, self.hardware, name=name, seed=0,
                    batch_size=self.batch_size,
                ).values()  # fmt: skip
            check_within(name, found, self.norm, self.eps)
            outcomes |= found.columns(name)
            examples[name] = torch.from_numpy(found.examples)
            attacks[name] = given | {"counts": True, "alone": False}
            self.warnings += warnings
        return self.context(outcomes=outcomes, adversarial=examples, attacks=attacks)


def run(case, analyses=()):
    """The suite, the audit and `analyses`; returns the context, and the one line that each of those refused with."""
    context = case.attack()
    masking(context, samples=20, steps=5, queries=5)
    assert all(math.isfinite(c["value"]) for c in case.saved["masking"]["checks"] if c["value"] is not None)
    refused = {}
    for name in analyses:
        try:
            OTHERS[name](context)
        except (NotMade, UserError) as error:
            assert "\n" not in str(error)
            refused[name] = str(error)
    return context, refused


SHAPES = [(1, 1, 1), (3, 2, 5), (1, 5, 7), (2, 12, 12), (1, 32, 48), (3, 64, 3)]


@pytest.mark.parametrize(("classes", "shape", "n", "norm"), [
    (2, (1, 1, 1), 1, "Linf"), (2, (1, 12, 12), 4, "L2"), (3, (2, 3, 19), 5, "L2"), (1000, (3, 18, 30), 2, "L2"),
])  # fmt: skip
def test_odd_data_through_suite_and_audit(tmp_path, hardware, classes, shape, n, norm):
    case = Case(tmp_path, hardware, classes=classes, shape=shape, n=n, norm=norm)
    run(case)
    verdict = case.saved["masking"]["verdict"]
    cannot = norm == "L2" and min(shape[1:]) < 5  # Square
    assert ("square failed" in verdict) == (cannot and "not measured" not in verdict), case.saved["masking"]
    said = [message for message in case.warnings if "instead of" in message]
    assert len(said) == (classes < 4 or cannot)
    assert sum("the number of wrong classes" in message for message in case.warnings) == (classes < 4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_odd_data_through_everything(tmp_path, hardware, classes, shape, n, norm):
    case = Case(tmp_path, hardware, classes=classes, shape=shape, n=n, norm=norm)
    _, refused = run(case, OTHERS)
    assert set(refused) <= {"norms"}  # where nothing was fooled


@pytest.mark.slow
def test_eps_0_is_said(tmp_path, hardware):
    case = Case(tmp_path, hardware, classes=3, shape=(1, 6, 6), n=4, eps=0)
    _, refused = run(case, OTHERS)
    assert refused == {"norms": "no attack fooled a sample", "gradients": "eps is 0", "landscape": "eps is 0"}
    assert case.saved["masking"]["verdict"] == "not measured"


@pytest.mark.parametrize("n", [1, 4])
def test_no_right_image_is_said(tmp_path, hardware, n):
    case = Case(tmp_path, hardware, classes=3, shape=(1, 6, 6), n=n)
    wrong = torch.arange(n) < max(n - 1, 1)  # the last of several is so already
    case.split.labels.add_(wrong.long()).remainder_(3)
    context, refused = run(case, ["norms", "curvature", "gradients", "landscape", "pictures"])
    assert set(refused) == {"norms", "curvature", "gradients", "landscape"}
    assert case.saved["masking"]["verdict"] == "not measured"
    assert accuracy(context.outcomes)["value"] == 0


def test_one_logit_is_refused_in_one_line(tmp_path, hardware):
    case = Case(tmp_path, hardware, classes=1, shape=(1, 6, 6), n=2)
    with pytest.raises(UserError, match="2 classes or more"):
        case.attack()


def not_finite_nearby(x, logits):
    """NaN except at images whose pixels are multiples of 1 / 255."""
    off = (x * 255 - (x * 255).round()).abs().amax((1, 2, 3)) > 1e-3
    return torch.where(off[:, None], torch.nan, logits)


def test_a_model_that_is_nan_beside_the_images_is_not_robust(tmp_path, hardware):
    case = Case(tmp_path, hardware, classes=3, shape=(1, 6, 6), n=8, far=not_finite_nearby)
    context, refused = run(case, ["entropy", "confusion", "curve", "landscape"])
    outcomes = context.outcomes
    assert accuracy(outcomes)["value"] == 7 / 8 and accuracy(outcomes, ["pgd"])["value"] == 0
    assert (outcomes["pgd_pred"][:7] == -1).all() and refused == {}
    assert any("NaN or infinity" in warning for warning in case.warnings)
    assert case.saved["masking"]["verdict"] == "not measured"
    assert case.saved["curve"][1]["value"] == 0  # at an eighth of eps, with not one right answer by NaN
    table = (tmp_path / "tables/confusion.csv").read_text()
    assert table.count("not finite") > 0 and "under attack" in table
    with np.load(tmp_path / "figures/landscape.npz") as file:
        assert (file["sl_0_classes"] == -1).any() and np.isnan(file["sl_0_loss"]).any()


@pytest.mark.slow
def test_every_analysis_is_made_again_with_smaller_batches_when_memory_runs_out(tmp_path, hardware):
    """As the run does it: nothing half done is left, and the smaller batches are kept to in every pass."""
    largest = 0

    class Memory(Net):
        limit = 10**9

        def forward(self, x):
            nonlocal largest
            if len(x) > self.limit:
                raise torch.OutOfMemoryError("out of memory")
            largest = max(largest, len(x))
            return super().forward(x)

    case = Case(tmp_path, hardware, classes=3, shape=(1, 6, 6), n=24, batch_size=16)
    case.model.__class__ = Memory
    context = case.attack()

    def made(analysis, size):
        """What it logs and saves; all of it only once it succeeds."""
        (tmp_path / "results.jsonl").unlink(missing_ok=True)
        case.saved.clear()
        try:
            results = analysis(replace(context, batch_size=size))
        except torch.OutOfMemoryError:
            assert case.saved == {} and not (tmp_path / "results.jsonl").exists()
            return made(analysis, size // 2)
        return {result.metric + result.attack + str(result.eps): result.value for result in results}, set(case.saved)

    for name, analysis in {"masking": partial(masking, samples=20, steps=5, queries=5), **OTHERS}.items():
        Memory.limit = 10**9
        expected, saved = made(analysis, 16)
        Memory.limit, largest = 5, 0
        again, same = made(analysis, 16)
        assert again == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True) and same == saved, name
        assert largest <= 5

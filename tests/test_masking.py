"""The gradient-masking audit on networks whose gradients are known to be masked, or known not to be."""

import math
import re
from dataclasses import replace
from functools import partial
from inspect import signature
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from aerl.analyses import AnalysisContext
from aerl.analyses.masking import masking
from aerl.analyses.masking.audit import Audit
from aerl.analyses.masking.effects import EFFECTS
from aerl.analyses.masking.symptoms import _paper_direction
from aerl.attacks import SampleGenerator, attacking, losses, pgd, predictions
from aerl.build import attack
from aerl.config.compose import read
from aerl.tracking.results import ResultLog, read_results
from tests.conftest import ROOT

QUICK = {"samples": 40, "steps": 30, "queries": 100}


class WinnersTakeAll(nn.Module):
    """k-winners-take-all (Xiao et al. 2020): only the largest tenth of a layer's activations pass."""

    def forward(self, x):
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class Apply(nn.Module):
    """A network with a function before or after it."""

    def __init__(self, net, *, before=nn.Identity(), after=nn.Identity()):  # noqa: B008
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def quantised(x):
    return torch.round(4 * x) / 4


def noisy(x):
    return x + 0.3 * torch.randn_like(x)


def scaled(net):
    return Apply(net, after=lambda logits: 100 * logits)


@pytest.fixture(scope="module")
def digits():
    """Images uint8 (N, 1, 8, 8), labels; the first 1400 are for training."""
    data = load_digits()
    order = np.random.default_rng(1).permutation(len(data.target))
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images[order])[:, None], torch.from_numpy(data.target[order])


def adversarial(norm, eps, trades):
    """The loss of PGD adversarial training, or that of TRADES."""

    def loss(net, x, y):
        x_adv = pgd(
            net, x, y, generator=SampleGenerator.for_images(x, 0), norm=norm, eps=eps, steps=3, step_size=eps / 2,
            loss="kl" if trades else "ce", drop_fooled=False, keep="last",
        )  # fmt: skip
        if trades:
            return F.cross_entropy(net(x), y) + 4 * losses.kl(net(x_adv), net(x)).mean()
        return F.cross_entropy(net(x_adv), y)

    return loss


@pytest.fixture(scope="module")
def trained(digits):
    """`trained(epochs=6, loss=None, activation=nn.ReLU, temperature=1)`: a small network, in training mode."""

    def train(epochs=6, loss=None, activation=nn.ReLU, temperature=1.0):
        loss = loss or (lambda net, x, y: F.cross_entropy(net(x) / temperature, y))
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(1, 12, 3, padding=1), activation(), nn.MaxPool2d(2),
                nn.Conv2d(12, 24, 3, padding=1), activation(), nn.Flatten(),
                nn.Linear(384, 48), activation(), nn.Linear(48, 10),
            )  # fmt: skip
            optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
            for batch in (batch for _ in range(epochs) for batch in torch.randperm(1400).split(64)):
                optimizer.zero_grad()
                loss(net, digits[0][batch].float() / 255, digits[1][batch]).backward()
                optimizer.step()
            optimizer.zero_grad()
        return net

    return train


@pytest.fixture(scope="module")
def plain(trained):
    return trained()


@pytest.fixture
def context(digits, hardware, tmp_path):
    """`context(model, **changes)` -> (the context of an audit, the summary that it writes to)."""

    def make(model, **changes):
        images, labels = digits[0][1400:], digits[1][1400:]
        pred = labels
        if "outcomes" not in changes:
            with attacking(model), torch.no_grad(), torch.random.fork_rng([]):
                pred = model(images.float() / 255).argmax(1)
        summary = {}
        identity = dict.fromkeys(("run_id", "dataset", "model", "trainer"), "") | {"seed": 0}
        given = AnalysisContext(
            model=model, images=images, labels=labels, class_names=tuple("0123456789"),
            outcomes={"label": labels.numpy(), "clean_pred": pred.numpy()}, adversarial={}, attacks={},
            figures=tmp_path, log=ResultLog(tmp_path, identity),
            norm="L2", eps=0.5, seed=0, trainer="sl", hardware=hardware, batch_size=64, save=summary.update,
        )  # fmt: skip
        return replace(given, **changes), summary

    return make


@pytest.fixture
def audit(context):
    """`audit(model, settings)` -> `masking` of summary.json, and its checks by name."""

    def run(model, settings=QUICK, **changes):
        given, summary = context(model, **changes)
        masking(given, **settings)
        return summary["masking"], {check["name"]: check for check in summary["masking"]["checks"]}

    return run


# --- networks that are masked, and others -----------------------------------------------------------------------


def test_logits_times_a_hundred_are_a_saturated_softmax(plain, audit):
    report, checks = audit(scaled(plain))
    n = report["n"]
    assert report["verdict"] == "masked" and report["mechanism"].startswith("saturated softmax: ")
    assert report["trust"].startswith("PGD on ") and "plain PGD on cross-entropy misses" in report["trust"]
    flagged = {name for name, check in checks.items() if check["flag"]}
    assert flagged >= {"saturated", "log_odds", "unbounded"} and "zero_gradient" not in flagged
    # It decides like the plain network, so an attack that does not depend on the scale fools the same samples.
    unscaled = audit(plain)[1]
    assert abs(robust(checks, n) - robust(unscaled, n)) <= 2 / n


def robust(checks, n):
    """The share of samples that withstand plain PGD and PGD on the log-odds."""
    missed = int(re.search(r"of the (\d+) samples", checks["log_odds"]["says"])[1])
    return missed / n - checks["log_odds"]["value"]


EITHER = "masked|suspicious"  # by the luck of a draw
NO_GRADIENT = "an operation without gradient: the gradient of every loss is exactly zero"
# The network, patterns of its verdict and of the attack to trust, and how the mechanism starts.
MASKED = {
    "distilled": (lambda plain, train: train(epochs=10, temperature=100.0), "masked", "PGD on", "saturated softmax: "),
    "quantised": (lambda plain, train: Apply(plain, before=quantised), "masked", "PGD that adapts", NO_GRADIENT),
    "detached": (lambda plain, train: Apply(plain, before=lambda x: quantised(x).detach()), "masked", "PGD that adapts",
                 NO_GRADIENT),
    "shattered": (lambda plain, train: train(epochs=12, activation=WinnersTakeAll), EITHER, "adapts|Square",
                  "shattered gradients: "),
    "noisy": (lambda plain, train: Apply(plain, before=noisy), EITHER, "PGD that adapts",
              "randomised model: two passes give different logits"),
    "probabilities": (lambda plain, train: Apply(plain, after=nn.Softmax(dim=1)), "suspicious", "PGD that adapts",
                      "probabilities in place of logits: "),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKED)
def test_masked_networks(case, plain, trained, audit):
    make, verdict, trust, mechanism = MASKED[case]
    model = make(plain, trained)
    report, checks = audit(model, **({"norm": "Linf", "eps": 0.1} if case == "shattered" else {}))
    assert re.fullmatch(verdict, report["verdict"]) and re.search(trust, report["trust"])
    assert report["mechanism"].startswith(mechanism)
    if case == "noisy":
        assert checks["adaptive"]["value"] is not None and checks["slope"]["value"] is None
        assert [check["value"] for check in audit(model)[0]["checks"]] == [c["value"] for c in report["checks"]]
    if mechanism == NO_GRADIENT:
        assert checks["zero_gradient"]["value"] == 1
        assert checks["slope"]["value"] is None and "every gradient of the margin is zero" in checks["slope"]["says"]


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.5), ("Linf", 0.1)])
@pytest.mark.parametrize("training", ["supervised", "PGD", "TRADES"])
def test_other_networks_show_no_sign(training, norm, eps, plain, trained, audit):
    loss = adversarial(norm, eps, trades=training == "TRADES")
    net = plain if training == "supervised" else trained(epochs=4, loss=loss)
    report, checks = audit(net, norm=norm, eps=eps)
    assert [name for name, check in checks.items() if check["flag"]] == []
    assert report["verdict"] == "no sign"
    unmeasured = [name for name, check in checks.items() if check["value"] is None]
    assert unmeasured == [*["paper_formula"] * (norm == "Linf"), "adaptive", "transfer"]
    assert sum(check["passes"] for check in checks.values()) == pytest.approx(report["passes"])


def test_two_classes(audit):
    images = torch.full((40, 1, 8, 8), 128, dtype=torch.uint8)
    images[:, 0, 1, 0] = torch.arange(40)  # equal images would get equal noise
    labels = torch.zeros(40, dtype=torch.int64)
    model = Apply(nn.Identity(), after=lambda x: (x[:, :1, 0, 0] - 0.6) * torch.tensor([-1.0, 1.0]))
    outcomes = {"label": labels.numpy(), "clean_pred": labels.numpy()}
    report, checks = audit(model, images=images, labels=labels, eps=0.05, outcomes=outcomes)
    assert report["verdict"] == "no sign" and report["n"] == 40
    assert checks["consistency"]["value"] == pytest.approx(1) and checks["slope"]["value"] == 0


def test_the_path_ends_where_plain_pgd_does_and_the_papers_steps_shrink_with_the_gradient(plain, context):
    state = Audit(context(plain)[0], samples=50, steps=20, queries=1)
    attack, noise = partial(pgd, eps=0.5, steps=20, loss="ce", drop_fooled=False, keep="last"), state.noise
    with attacking(state.model), torch.no_grad():
        last = attack(plain, state.x, state.y, generator=noise(state.x, "plain"))
        assert torch.equal(state.plain.last, last)
        assert torch.equal(predictions(plain(last)) != state.y, state.plain.wrong[:, -1])
        assert state.plain.wrong[:, -1].sum() > state.plain.wrong[:, 0].sum()
    gradient = torch.tensor([1e-3, 1.0]).view(2, 1, 1, 1) * 2.56e-5  # norms of the batch mean: 1e-10 and 1e-7
    assert _paper_direction(gradient, "L2").flatten().tolist() == pytest.approx([1e-4, 0.1])


# --- the audit as a part of the run -----------------------------------------------------------------------------


def test_it_changes_neither_the_model_nor_the_random_state(plain, audit):
    plain.train()
    plain[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    try:
        audit(Apply(plain, before=noisy), settings=QUICK | {"samples": 20, "queries": 5})
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)
        assert all(module.training for module in plain.modules())
        for name, value in plain.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, before[name])
        assert [name for name, parameter in plain.named_parameters() if not parameter.requires_grad] == ["0.bias"]
        assert all(parameter.grad is None for parameter in plain.parameters())
    finally:
        plain[0].bias.requires_grad_(True)


def test_the_batch_size_changes_nothing(plain, audit):
    first, second = (audit(scaled(plain), QUICK | {"steps": 15}, batch_size=size)[0] for size in (16, 500))
    for a, b in zip(first["checks"], second["checks"], strict=True):
        assert (a["name"], a["flag"]) == (b["name"], b["flag"])
        assert a["value"] == pytest.approx(b["value"], abs=1.01 / first["n"]), a["name"]
        assert a["passes"] == pytest.approx(b["passes"], rel=0.1, abs=1)
    assert (first["verdict"], first["n"]) == (second["verdict"], second["n"])


def test_transferred_examples_count_only_within_the_threat_model_and_on_all_samples(plain, audit, digits):
    labels = digits[1][1400:].numpy()
    with torch.no_grad():
        pred = plain(digits[0][1400:].float() / 255).argmax(1).numpy()
    outcomes = {"label": labels, "clean_pred": pred, "transfer_a_pred": (labels + 1) % 10}
    for counts, alone in ((True, True), (False, True), (True, False)):
        attacks = {"transfer_a": {"counts": counts, "alone": alone}}
        report, checks = audit(plain, QUICK | {"queries": 5}, outcomes=outcomes, attacks=attacks)
        if counts and alone:
            assert report["verdict"] == "masked" and checks["transfer"]["flag"]
            assert report["trust"].startswith("transfer (attack=transfer): it fools ")
        else:
            assert report["verdict"] == "no sign"
            assert checks["transfer"]["says"] == "not measured: no source; add attack=transfer"


def crash(*args, **kwargs):
    raise RuntimeError("The size of tensor a (2) must match\nthe size of tensor b (4)")


@pytest.mark.parametrize(
    ("model", "eps", "reason"),
    [
        (lambda x: x.flatten(1)[:, :10] / 0, 0.5, "NaN"),
        (crash, 0.5, "plain PGD failed: The size of tensor a (2) must match"),
        (lambda x: x.flatten(1)[:, :10], 0.0, "eps is 0"),
    ],
)
def test_where_plain_pgd_cannot_run_nothing_is_measured(model, eps, reason, context, digits):
    labels = digits[1][1400:].numpy()
    outcomes = {"label": labels, "clean_pred": labels}
    given, summary = context(Apply(nn.Identity(), after=model), eps=eps, outcomes=outcomes)
    assert masking(given, **QUICK) == []
    report = summary["masking"]
    assert report["verdict"] == "not measured" and reason in report["mechanism"]
    assert all(check["value"] is None and check["says"].startswith("not measured: ") for check in report["checks"])


def test_a_check_that_fails_is_named_in_the_verdict(plain, audit, monkeypatch):
    monkeypatch.setattr("pyautoattack.square.SquareAttack.attack_single_run", crash)
    few = QUICK | {"queries": 20}
    report, checks = audit(plain, few)
    assert report["verdict"] == "no sign (square failed)"
    assert "square failed: The size of tensor a (2) must match" in report["mechanism"]
    assert checks["square"]["value"] is None and checks["square"]["says"].startswith("failed: The size")
    assert audit(scaled(plain), few)[0]["verdict"] == "masked (square failed)"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("cuDNN: CUDNN_STATUS_ALLOC_FAILED")])
@pytest.mark.parametrize("place", ["torch.nn.Linear.forward", "pyautoattack.square.SquareAttack.attack_single_run"])
def test_out_of_memory_is_raised_and_nothing_is_recorded(place, error, plain, context, monkeypatch):
    given, summary = context(plain)
    monkeypatch.setattr(place, Mock(side_effect=error))
    with pytest.raises(type(error)):
        masking(given, samples=20, steps=5, queries=5)
    assert summary == {} and not given.log.path.exists()


def test_numbers_go_to_the_results_the_table_and_the_logger(plain, context, tmp_path):
    given, summary = context(plain)
    given.log.logger = logger = Mock()
    results = masking(given, samples=20, steps=5, queries=5)
    assert results == read_results(tmp_path / "results.jsonl")
    report = summary["masking"]
    measured = {check["name"]: check["value"] for check in report["checks"] if check["value"] is not None}
    assert {result.metric: result.value for result in results} == measured
    assert {(r.attack, r.norm, r.eps, r.split, r.n) for r in results} == {("masking", "L2", 0.5, "test", report["n"])}
    name, columns, rows = logger.table.call_args.args
    assert name == "tables/masking"
    assert [dict(zip(columns, row, strict=True)) for row in rows] == report["checks"]
    assert logger.summary.call_args_list[0].args[0]["masking/verdict"] == report["verdict"]
    for check in report["checks"]:
        assert {*check} == {"name", "value", "threshold", "flag", "role", "says", "source", "seconds", "passes"}
        assert check["role"] in ("effect", "symptom", "formula") and check["source"] and check["says"]
        assert check["value"] is None or math.isfinite(check["value"])


def test_the_options_that_it_recommends_compose():
    for effect in EFFECTS.values():
        if effect.option not in ("", "attack=transfer"):  # which needs its sources
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                config = read(compose("config", overrides=effect.option.split()))
            for name, spec in config.attack.items():
                attack(spec, f"attack.{name}", "L2", 1.0)


def test_its_file_states_its_defaults():
    options = yaml.safe_load((ROOT / "conf/analysis/masking.yaml").read_text())
    assert options.pop("_target_") == "aerl.analyses.masking.masking" and options.pop("runs") == []
    defaults = {name: p.default for name, p in signature(masking).parameters.items() if name not in ("context", "runs")}
    assert options == defaults

"""The gradient-masking audit on networks whose gradients are known to be masked, or known not to be."""

import math
from dataclasses import replace
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from sklearn.datasets import load_digits
from torch import nn

from aerl.analyses import AnalysisContext
from aerl.analyses.masking import _ALTERNATIVES, masking
from aerl.analyses.masking.checks import Audit
from aerl.attacks import SampleGenerator, attacking, pgd
from aerl.build import attack
from aerl.config.compose import read
from aerl.runtime.device import stream
from aerl.tracking.results import ResultLog, read_results
from aerl.training.loop import TrainStep
from aerl.training.objectives import Labels, adversarial_training, policy_gradient, trades
from tests.conftest import ROOT

QUICK = {"samples": 40, "steps": 30, "queries": 150}


class WinnersTakeAll(nn.Module):
    """k-winners-take-all (Xiao et al. 2020): only the largest tenth of a layer's activations pass."""

    def forward(self, x):
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class Apply(nn.Module):
    """A network whose images or logits go through a function."""

    def __init__(self, net, *, before=nn.Identity(), after=nn.Identity()):  # noqa: B008
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def quantised(x):
    return torch.round(4 * x) / 4


def noisy(x):
    return x + 0.3 * torch.randn_like(x)


@pytest.fixture(scope="module")
def digits():
    """Images uint8 (N, 1, 8, 8), labels; the first 1400 are for training."""
    data = load_digits()
    order = np.random.default_rng(1).permutation(len(data.target))
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images[order])[:, None], torch.from_numpy(data.target[order])


CLEAN = (partial(policy_gradient, weight=0.0), None)


@pytest.fixture(scope="module")
def trained(digits, hardware):
    """`trained(epochs=6, defence=CLEAN, activation=nn.ReLU, temperature=1)`: a small network, in training mode."""

    def train(epochs=6, defence=CLEAN, activation=nn.ReLU, temperature=1.0):
        images, labels = digits
        generator = stream(0, "masking tests")
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(1, 12, 3, padding=1), activation(), nn.MaxPool2d(2),
                nn.Conv2d(12, 24, 3, padding=1), activation(), nn.Flatten(),
                nn.Linear(384, 48), activation(), nn.Linear(48, 10),
            )  # fmt: skip
            cooled = Apply(net, after=lambda logits: logits / temperature)
            objective, attack = defence
            step = TrainStep(cooled, partial(objective, act=Labels(), probability_floor=0.0), hardware)
            optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
            for _ in range(epochs):
                for batch in torch.randperm(1400, generator=generator).split(64):
                    optimizer.zero_grad()
                    x, y = images[batch].float() / 255, labels[batch]
                    step(x, y, generator, attack)[0].backward()
                    optimizer.step()
            optimizer.zero_grad()
        return net

    return train


@pytest.fixture(scope="module")
def plain(trained):
    return trained()


@pytest.fixture
def context(digits, hardware, tmp_path):
    """`context(model)` -> (what the audit is given, the summary it writes to)."""

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
    """`audit(model)` -> what summary.json says, and the checks by name."""

    def run(model, settings=QUICK, **changes):
        given, summary = context(model, **changes)
        masking(given, **settings)
        told = summary["masking"]
        return told, {check["name"]: check for check in told["checks"]}

    return run


def climb(norm, eps, loss="ce"):
    return partial(pgd, norm=norm, eps=eps, steps=3, step_size=eps / 2, loss=loss, drop_fooled=False, keep="last")


# ------------------------------------------------------------------------------- masked, and known to be


def test_logits_times_a_hundred_are_a_saturated_softmax(plain, audit):
    told, checks = audit(Apply(plain, after=lambda logits: 100 * logits))
    assert told["verdict"] == "masked"
    n = told["n"]
    zero = round(checks["zero_ce_gradient"]["value"] * n)
    assert told["mechanism"] == (
        f"saturated softmax: the gradient of the cross-entropy is exactly zero, that of the margin is not, on {zero} "
        f"of {n} samples"
    )
    assert zero > n / 2
    assert told["trust"].startswith("PGD on ") and "not plain PGD on cross-entropy" in told["trust"]
    for name in (
        "log_odds",
        "margin",
        "logit_scale",
        "float64",
        "float64_gradient",
        "unbounded",
        "zero_on_path",
    ):
        assert checks[name]["flag"], name
    assert not checks["zero_gradient"]["flag"]
    # The decisions are those of the plain network: an attack that the scale cannot touch finds the same.
    honest = audit(plain)[1]
    assert abs(robust(checks) - robust(honest)) <= 2 / n
    assert checks["paper_step_length"]["value"] < 0.1 < 0.9 < honest["paper_step_length"]["value"]


def robust(checks):
    """The share of samples that neither plain PGD nor PGD on the log-odds fools."""
    missed, n = map(int, checks["log_odds"]["says"].split("that plain")[0].removeprefix("of the ").replace(
        " samples ", "").split(" of "))  # fmt: skip
    return missed / n - checks["log_odds"]["value"]


def test_temperature_distillation_is_a_saturated_softmax(trained, audit):
    told, checks = audit(trained(epochs=10, temperature=100.0))
    assert told["verdict"] == "masked"
    assert told["mechanism"].startswith("saturated softmax: ")
    assert checks["log_odds"]["flag"]


@pytest.mark.parametrize("detached", [False, True])
def test_quantised_images_are_an_operation_without_gradient(plain, audit, detached):
    before = (lambda x: quantised(x).detach()) if detached else quantised  # zero, or no graph at all
    told, checks = audit(Apply(plain, before=before))
    assert told["verdict"] == "masked"
    assert told["mechanism"].startswith("an operation without gradient: the gradient of every loss is exactly zero")
    assert told["trust"].startswith("Square")
    assert checks["zero_gradient"]["value"] == 1
    assert checks["slope"]["value"] is None and "every gradient of the margin is zero" in checks["slope"]["says"]


def test_winners_take_all_shatters_gradients(trained, audit):
    told, _ = audit(trained(epochs=12, activation=WinnersTakeAll), norm="Linf", eps=0.1)
    assert told["verdict"] in ("masked", "suspicious")
    assert told["mechanism"].startswith("shattered gradients: ")
    assert "Square" in told["trust"]


def test_noise_inside_is_a_randomised_model(plain, audit):
    told, checks = audit(Apply(plain, before=noisy), settings=QUICK | {"queries": 50})
    assert told["verdict"] in ("masked", "suspicious")
    assert told["mechanism"].startswith("randomised model: two passes give different logits")
    assert told["trust"].startswith("PGD averaged over passes")
    assert checks["eot"]["value"] is not None and checks["slope"]["value"] is None
    again, _ = audit(Apply(plain, before=noisy), settings=QUICK | {"queries": 50})
    assert [check["value"] for check in again["checks"]] == [check["value"] for check in told["checks"]]


def test_probabilities_are_told_from_logits(plain, audit):
    told, _ = audit(Apply(plain, after=nn.Softmax(dim=1)), settings=QUICK | {"queries": 50})
    assert told["verdict"] == "suspicious"
    assert told["mechanism"].startswith("probabilities in place of logits: ")


# ------------------------------------------------------------------------------ honest, and known to be


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.5), ("Linf", 0.1)])
@pytest.mark.parametrize("training", ["supervised", "PGD", "TRADES"])
def test_honest_training_shows_no_sign(training, norm, eps, plain, trained, audit):
    given = {
        "PGD": (adversarial_training, climb(norm, eps)),
        "TRADES": (partial(trades, weight=4.0), climb(norm, eps, "kl")),
    }
    net = trained(epochs=4, defence=given[training]) if training in given else plain
    told, checks = audit(net, norm=norm, eps=eps)
    assert [name for name, check in checks.items() if check["flag"]] == []
    assert told["verdict"] == "no sign"
    assert [name for name, check in checks.items() if check["value"] is None] == (
        ["transfer"] if norm == "L2" else ["paper_formula", "transfer"]
    )
    assert sum(check["passes"] for check in checks.values()) == pytest.approx(told["passes"])


# ----------------------------------------------------------------------------- what the audit must not do


def test_it_leaves_model_and_random_state_as_they_were(plain, audit, digits):
    plain.train()
    plain[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    flags = [(module.training) for module in plain.modules()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    try:
        audit(Apply(plain, before=noisy), settings=QUICK | {"samples": 20, "queries": 5})
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)
        assert [module.training for module in plain.modules()] == flags
        for name, value in plain.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, before[name])
        assert [name for name, parameter in plain.named_parameters() if not parameter.requires_grad] == ["0.bias"]
        assert all(parameter.grad is None for parameter in plain.parameters())
    finally:
        plain[0].bias.requires_grad_(True)


def test_the_batch_size_changes_nothing(plain, audit):
    scaled = Apply(plain, after=lambda logits: 100 * logits)
    few = QUICK | {"samples": 40, "steps": 15, "queries": 50}
    (one, _), (other, _) = (audit(scaled, few, batch_size=size) for size in (16, 500))
    for a, b in zip(one["checks"], other["checks"], strict=True):
        assert (a["name"], a["flag"]) == (b["name"], b["flag"])
        assert a["value"] == pytest.approx(b["value"], abs=1.01 / one["n"]), a["name"]
        assert a["passes"] == pytest.approx(b["passes"], rel=0.1, abs=1)
    assert (one["verdict"], one["n"]) == (other["verdict"], other["n"])


# ----------------------------------------------------------------------------------- the parts of it


def test_plain_pgd_is_the_pgd_of_attack_pgd(plain, context):
    given, _ = context(plain)
    audit = Audit(given, samples=50, steps=20, queries=1, gain=0.05, significance=0.01)
    plain_pgd = partial(pgd, norm="L2", eps=0.5, steps=20, loss="ce", drop_fooled=False, keep="last")
    noise = SampleGenerator.for_images(audit.x, 0, "masking/plain")
    with attacking(audit.model), torch.no_grad():
        assert torch.equal(audit.plain.last, plain_pgd(plain, audit.x, audit.y, generator=noise))
        assert audit.plain.wrong.any(1).sum() > audit.plain.wrong[:, 0].sum()  # and it does attack


def test_transferred_examples_count_only_within_the_threat_model_and_on_all_samples(plain, audit, digits):
    labels = digits[1][1400:].numpy()
    wrong = (labels + 1) % 10
    counts = {"counts": True, "alone": True}
    with torch.no_grad():
        pred = plain(digits[0][1400:].float() / 255).argmax(1).numpy()
    outcomes = {"label": labels, "clean_pred": pred, "transfer_a_pred": wrong, "transfer_b_pred": wrong}
    few = QUICK | {"samples": 30, "queries": 5}
    told, checks = audit(plain, few, outcomes=outcomes, attacks={"transfer_a": counts})
    assert told["verdict"] == "masked" and checks["transfer"]["flag"]
    assert told["trust"].startswith("transferred examples (attack=transfer), not plain PGD")
    for other in ({"counts": False, "alone": True}, {"counts": True, "alone": False}):
        told, checks = audit(plain, few, outcomes=outcomes, attacks={"transfer_b": other})
        assert told["verdict"] == "no sign"
        assert checks["transfer"]["says"] == "not measured: no source; add attack=transfer"


class Cycle(nn.Module):
    """Two classes, whose margin is a given function of the first pixel."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        value = self.function(x[:, 0, 0, 0])
        return torch.stack([-value, value], dim=1)


def test_two_classes_will_do(context):
    images = torch.full((40, 1, 8, 8), 128, dtype=torch.uint8)
    images[:, 0, 1, 0] = torch.arange(40)  # or all would draw the same noise
    labels = torch.zeros(40, dtype=torch.int64)
    given, summary = context(
        Cycle(lambda pixel: pixel - 0.6), images=images, labels=labels, eps=0.05,
        outcomes={"label": labels.numpy(), "clean_pred": labels.numpy()},
    )  # fmt: skip
    masking(given, **QUICK)
    told = summary["masking"]
    assert told["verdict"] == "no sign" and told["n"] == 40
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["consistency"]["value"] == pytest.approx(1) and checks["slope"]["value"] == 0


def never(x):
    raise RuntimeError("no such model\nnor its friends")


@pytest.mark.parametrize(
    ("model", "eps", "says"),
    [
        (lambda x: x.flatten(1)[:, :10] / 0, 0.5, "NaN"),
        (never, 0.5, "plain PGD on cross-entropy cannot run: no such model"),
        (lambda x: x.flatten(1)[:, :10], 0.0, "eps is 0"),
    ],
)
def test_what_cannot_be_measured_is_said_and_crashes_nothing(model, eps, says, context, digits):
    labels = digits[1][1400:]
    given, summary = context(
        Apply(nn.Identity(), after=model), eps=eps,
        outcomes={"label": labels.numpy(), "clean_pred": labels.numpy()},
    )  # fmt: skip
    assert masking(given, **QUICK) == []
    told = summary["masking"]
    assert told["verdict"] == "not measured" and says in told["mechanism"]
    assert all(check["value"] is None and check["says"].startswith("not measured: ") for check in told["checks"])


class Failing(Apply):
    """Fails with `error` from the pass after `calls` without a gradient on."""

    def __init__(self, net, error, calls):
        super().__init__(net)
        self.error, self.calls = error, calls

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.calls -= 1
            if self.calls < 0:
                raise self.error
        return super().forward(x)


def test_a_check_that_fails_is_named_in_the_verdict(plain, audit, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("The size of tensor a (2) must match\nthe size of tensor b (4)")

    monkeypatch.setattr("pyautoattack.square.SquareAttack.attack_single_run", crash)
    few = QUICK | {"queries": 20}
    told, checks = audit(plain, few)
    assert told["verdict"] == "no sign (square failed)"
    assert "square failed: The size of tensor a (2) must match" in told["mechanism"]
    assert checks["square"]["value"] is None and checks["square"]["says"].startswith("failed: The size")
    assert checks["transfer"]["says"] == "not measured: no source; add attack=transfer"  # which is no failure
    assert audit(Apply(plain, after=lambda z: 100 * z), few)[0]["verdict"] == "masked (square failed)"
    told, _ = audit(Apply(plain, before=lambda x: x.float()), few)
    assert told["verdict"] == "no sign (float64_gradient, float64, square failed)"


def test_out_of_memory_is_no_finding(plain, context):
    """Wherever it happens, it is raised, for the run to try again with smaller batches, and nothing is recorded."""
    memory = torch.OutOfMemoryError("out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    for calls in (0, 60):
        given, summary = context(Apply(plain))
        for error in memory:
            with pytest.raises(type(error)):
                masking(replace(given, model=Failing(plain, error, calls)), samples=20, steps=5, queries=50)
        assert summary == {} and not given.log.path.exists()


def test_numbers_go_to_the_results_and_the_tracker(plain, context, tmp_path):
    class Tracker:
        def __init__(self):
            self.tables, self.values = {}, {}

        def table(self, name, columns, rows):
            self.tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]

        def summary(self, values):
            self.values |= values

    given, summary = context(plain)
    given.log.tracker = tracker = Tracker()
    results = masking(given, samples=20, steps=5, queries=5)
    assert results == read_results(tmp_path / "results.jsonl")
    told = summary["masking"]
    measured = {check["name"]: check["value"] for check in told["checks"] if check["value"] is not None}
    assert {result.metric: result.value for result in results} == measured
    assert {(r.attack, r.norm, r.eps, r.split, r.n) for r in results} == {("masking", "L2", 0.5, "test", told["n"])}
    assert tracker.tables["tables/masking"] == told["checks"]
    assert tracker.values["masking/verdict"] == told["verdict"]
    for check in told["checks"]:
        assert check.keys() == {
            "name", "value", "threshold", "flag", "role", "says", "source", "seconds", "passes",
        }  # fmt: skip
        assert check["role"] in ("effect", "symptom", "formula") and check["source"] and check["says"]
        assert check["value"] is None or math.isfinite(check["value"])


def test_the_attacks_it_advises_compose():
    for advice in _ALTERNATIVES.values():
        words = advice.partition("(")[2].rstrip(")").split()
        if words != ["attack=transfer"]:  # which needs its sources named
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                config = read(compose("config", overrides=words))
            for name, spec in config.attack.items():
                attack(spec, f"attack.{name}")


def test_its_file_states_its_defaults():
    options = yaml.safe_load((ROOT / "conf/analysis/masking.yaml").read_text())
    assert options.pop("_target_") == "aerl.analyses.masking.masking"
    defaults = {name: p.default for name, p in signature(masking).parameters.items() if name != "context"}
    assert options == defaults

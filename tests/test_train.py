"""The training loop: what a step computes, that it learns, resumes to the bit, and stops on NaN."""

import math
import os
import pkgutil
import signal
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from aerl.attacks import BatchGenerator, pgd
from aerl.build import build_recipe
from aerl.config.compose import read
from aerl.data import Batches, DataSplits, Split, augment, mix, to_unit
from aerl.errors import UserError
from aerl.models import Classifier
from aerl.runtime import signals
from aerl.runtime.device import stream
from aerl.tracking.results import ResultLog, read_results
from aerl.training import checkpoint
from aerl.training.average import Average
from aerl.training.loop import Adversary, Recipe, TrainStep, check_recipe, fit, validate
from aerl.training.objectives import (
    EpsilonGreedy,
    Labels,
    adversarial_training,
    label_smoothing,
    policy_gradient,
    policy_loss,
    trades,
)
from aerl.training.reinforce import Reinforce
from aerl.training.schedule import Schedule
from tests.conftest import ROOT
from tests.runs import results_of

FGSM = partial(pgd, norm="Linf", eps=0.05, steps=1, step_size=0.05, random_start=False, drop_fooled=False, keep="last")


@pytest.fixture(scope="module")
def data() -> DataSplits:
    """Two classes that differ in which half of the image is bright."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 2
        images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        images[labels == 0, :, :, :4] += 100
        images[labels == 1, :, :, 4:] += 100
        return Split(images, labels)

    return DataSplits(split(200), split(60), split(60), ("left", "right"), (0.4,), (0.3,))


def network(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 2)
    )
    return Classifier(net, (0.4,), (0.3,))


def recipe(**changes) -> Recipe:
    """Six steps an epoch."""
    settings = {
        "epochs": 4,
        "batch_size": 32,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "objective": policy(),
        "schedule": Schedule("cosine", warmup=0.1),
        "clip": 1.0,
        "augment": partial(augment, hflip=0.0, vflip=0.5, translate=0.1),
    }
    return Recipe(**(settings | changes))


def policy(act=Labels(), weight=1.0):  # noqa: B008
    return partial(policy_gradient, act=act, weight=weight, probability_floor=0.0)


@pytest.fixture
def train(tmp_path, data, hardware):
    """`train(recipe, folder)` trains a new network; returns it and the best epoch."""

    def run(recipe, name="", seed=0, model=None, hardware=hardware):
        model, folder = model or hardware.place(network(seed)), tmp_path / name
        folder.mkdir(exist_ok=True)
        log = ResultLog(folder, {"run_id": "r", "seed": seed, "dataset": "d", "model": "m", "trainer": "t"})
        best = fit(model, data, recipe, hardware, seed=seed, folder=folder / "checkpoints", results=log)
        return model.state_dict(), best

    return run


def assert_same(tmp_path, end, other, names=("whole", "cut")):
    """Weights to the bit, the best epoch, and every number once."""
    (weights, best), (other_weights, other_best) = end, other
    assert best == other_best and all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert results_of(tmp_path / names[0]) == results_of(tmp_path / names[1])


def step_of(objective, hardware, attack=None):
    """The loss and metrics of one step without dropout and batch statistics, and what it was computed on."""
    model = network().eval()
    x, y = torch.rand(16, 1, 8, 8, generator=stream(1)), torch.arange(16) % 2
    return *TrainStep(model, objective, hardware)(x, y, stream(0), attack), model, x, y


def test_policy_gradient_by_labels_is_cross_entropy_plus_its_weighted_adversarial_loss(hardware):
    loss, metrics, model, x, y = step_of(policy(weight=0.5), hardware, FGSM)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    x_adv = (x + 0.05 * gradient.sign()).clamp(0, 1).detach()
    expected = F.cross_entropy(model(x_adv), y)
    torch.testing.assert_close(metrics["adversarial_loss"], expected.detach())
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y) + 0.5 * expected)
    torch.testing.assert_close(step_of(policy(), hardware)[0], F.cross_entropy(model(x), y))


def test_adversarial_training_is_cross_entropy_on_the_examples_alone(hardware):
    """Madry et al. 2018, equation 2.1."""
    objective = partial(adversarial_training, act=Labels(), probability_floor=0.0)
    loss, _, model, x, y = step_of(objective, hardware, FGSM)
    torch.testing.assert_close(loss, F.cross_entropy(model(FGSM(model, x, y, generator=None)), y))


def test_trades_is_clean_cross_entropy_plus_the_kl_to_the_examples(hardware):
    """Zhang et al. 2019, equation 5, against torch's own divergence; both predictions get a gradient."""
    attack = partial(pgd, norm="Linf", eps=0.05, steps=2, loss="kl", drop_fooled=False, keep="last")
    objective = partial(trades, act=Labels(), weight=6.0, probability_floor=0.0)
    loss, _, model, x, y = step_of(objective, hardware, attack)
    x_adv = attack(model, x, y, generator=BatchGenerator(stream(0), 16))
    p, q = model(x).softmax(1), model(x_adv).log_softmax(1)
    expected = F.cross_entropy(model(x), y) + 6 * F.kl_div(q, p, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Waiting(TorchDispatchMode):
    """Raises at whatever makes the host wait for the device to know a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}:
            raise AssertionError(f"waits: {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "trainer",
    ["sl", "rl", "rl_adv", "rl_expected", "rl_trades", "gce", "reinforce", "label_smoothing", "pgd_at", "trades"],
)
def test_a_training_step_never_waits_for_the_device(hardware, trainer, precision):
    """From the augmentation to the clipped gradients, as in conf/trainer."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = read(compose("config", overrides=[f"trainer={trainer}", "eps=0.3"]))
    recipe, hardware = build_recipe(config), replace(hardware, precision=precision)
    model, dtypes = network(), set()
    model.net[5].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    step = TrainStep(model, recipe.objective, hardware)
    images, y = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8), torch.arange(16) % 2
    with Waiting():
        x = to_unit(augment(images, stream(0), hflip=0.5, vflip=0.5, translate=0.1))
        loss, metrics = step(x, y, stream(0), recipe.adversary and recipe.adversary.attack)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert {"accuracy"} <= metrics.keys()
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}  # in the adversary, too


def factors(schedule, epochs=10, steps=10):
    """The factor of every step."""
    return [schedule.factor(epoch, step, steps, epochs) for epoch in range(epochs) for step in range(steps)]


def of_torch(make, steps=100):
    """The rate of every step of one of torch's schedulers, for a base rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_are_those_of_torch():
    from torch.optim import lr_scheduler as torchs

    cases = [
        (Schedule("cosine"), lambda o: torchs.CosineAnnealingLR(o, 100)),
        (Schedule("cosine", restarts=3), lambda o: torchs.CosineAnnealingWarmRestarts(o, 25)),
        (Schedule("linear"), lambda o: torchs.LinearLR(o, 1.0, 0.0, 100)),
        (Schedule("constant", warmup=0.2, start=0.5), lambda o: torchs.LinearLR(o, 0.5, 1.0, 20)),
        (Schedule("step", milestones=[4, 7], gamma=0.2), lambda o: torchs.MultiStepLR(o, [40, 70], 0.2)),
    ]
    for schedule, make in cases:
        assert factors(schedule) == pytest.approx(of_torch(make), abs=1e-6), schedule
    # Torch's reaches its peak and its end one step earlier: the same is a cycle of one step more.
    one_cycle = of_torch(lambda o: torchs.OneCycleLR(o, 1.0, total_steps=101, pct_start=31 / 101))
    assert factors(Schedule("one_cycle", warmup=0.3, start=0.04, floor=4e-6)) == pytest.approx(one_cycle, abs=5e-6)


def test_schedules_warm_up_from_zero_and_change_by_step_or_by_epoch():
    linear = factors(Schedule("linear", warmup=0.1))
    assert linear[:10] == pytest.approx([step / 10 for step in range(10)]) and linear[10] == 1 and 0 < linear[-1] < 0.02
    assert set(factors(Schedule())) == {1.0}
    paper = Schedule("linear", warmup=0.05, floor=0.1, per="epoch")
    expected = [epoch / 5 if epoch < 5 else max(0.1, 1 - (epoch - 5) / 95) for epoch in range(100)]
    assert [paper.factor(epoch, 7, 10, 100) for epoch in range(100)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"kind": "step", "milestones": [75, 90]},
            r"milestones=\[75, 90\]: after the last epoch; .*=20 try \[16, 19\]",
        ),
        ({"kind": "step"}, r"kind=step needs epochs, such as \[15\]"),
        ({"kind": "linear", "milestones": [5]}, "belong to trainer.schedule.kind=step, not linear"),
        ({"kind": "linear", "restarts": 2}, "restarts=2: belongs to trainer.schedule.kind=cosine"),
        ({"kind": "one_cycle"}, "warmup=0: .*try 0.3"),
    ],
)
def test_a_schedule_that_does_not_fit_the_training_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Schedule(**settings).check(20)


def test_the_average_of_the_weights_is_validated_kept_and_resumed(tmp_path, train, data, hardware):
    """best.pt has the moving average, computed here by hand; last.pt goes on with both sets of weights."""
    end = train(recipe(ema=0.9, select="last"), "whole")
    best = torch.load(tmp_path / "whole/checkpoints/best.pt")["model"]
    assert not all(torch.equal(best[name], end[0][name]) for name in best)
    augment, steps = recipe().augment, iter(range(1000))

    def stops(images, generator):
        if next(steps) == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return augment(images, generator)

    with signals.listening(), suppress(signals.Stopped):
        train(recipe(ema=0.9, select="last", augment=stops), "cut")
    with signals.listening():
        again = train(recipe(ema=0.9, select="last"), "cut")
    assert_same(tmp_path, again, end)
    resumed = torch.load(tmp_path / "cut/checkpoints/best.pt")["model"]
    assert all(torch.equal(best[name], resumed[name]) for name in best)


def test_an_average_is_the_sum_of_the_weights_by_their_decay():
    model = nn.BatchNorm1d(1)
    average = Average(model, 0.5)
    expected = model.weight.item()
    for step in range(1, 5):
        with torch.no_grad():
            model.weight.fill_(10.0 * step)
            model.running_mean.fill_(step)
            model.num_batches_tracked.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * 10 * step
    assert average.model.weight.item() == pytest.approx(expected)
    assert 0 < average.model.running_mean.item() < 4 and average.model.num_batches_tracked == 4


@pytest.mark.parametrize("objective", [policy(), partial(label_smoothing, weight=1.0, smoothing=0.1)])
@pytest.mark.parametrize("adversary", [None, Adversary(FGSM)])
def test_mixed_labels_are_trained_on_by_their_shares(train, tmp_path, objective, adversary):
    """The adversary attacks the class of the largest share, and the loss is cross-entropy with the shares."""
    with signals.listening():
        train(recipe(objective=objective, mix=partial(mix, cutmix=1.0), adversary=adversary, epochs=12))
    accuracy = [
        r.value for r in read_results(tmp_path / "results.jsonl") if r.metric == "accuracy" and r.split == "val"
    ]
    assert accuracy[-1] > 0.9


def test_the_loss_of_mixed_labels_is_cross_entropy_with_their_shares():
    logits, labels, shares = torch.randn(5, 3), torch.arange(5) % 3, torch.rand(5, 3).softmax(1)
    for floor in (0.0, 1e-6):
        loss = policy_loss(logits, shares, shares, floor)
        torch.testing.assert_close(loss, F.cross_entropy(logits, shares, reduction="none"), rtol=1e-4, atol=1e-4)
        whole = F.one_hot(labels, 3).float()
        torch.testing.assert_close(policy_loss(logits, whole, whole, floor), policy_loss(logits, labels, labels, floor))


def test_training_ends_when_it_no_longer_improves(train, tmp_path):
    """With a rate of 0 and accuracies that stay equal: epoch 1 is the last that improved."""
    frozen = network().eval()
    frozen.train = lambda mode=True: frozen
    train(recipe(epochs=40, patience=3, optimizer=partial(torch.optim.SGD, lr=0.0)), model=frozen)
    epochs = [r.step for r in read_results(tmp_path / "results.jsonl") if r.metric == "loss" and r.split == "train"]
    assert epochs == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (torch.optim.LBFGS, "TypeError: .*closure"),
        (torch.optim.SparseAdam, "RuntimeError: SparseAdam does not support dense gradients"),
        (partial(torch.optim.SGD, lr=-1), "Invalid learning rate: -1"),
    ],
)
def test_an_optimizer_that_cannot_step_is_found_before_training(optimizer, reason):
    with pytest.raises(UserError, match=f"trainer.optimizer: .*{reason}") as error:
        check_recipe(recipe(optimizer=optimizer), network(), torch.device("cpu"))
    assert "\n" not in str(error.value)


FOCAL = """
from torch.nn import functional as F


def focal(model, x, y, *, x_adv, generator, gamma: float):
    loss = F.cross_entropy(model(x), y, reduction="none")
    return (1 - (-loss).exp()) ** gamma * loss, {"surprise": loss.mean()}
"""


def test_an_objective_of_the_users_own_trains_from_the_command_line(launch, tmp_path):
    """One Python file and one YAML file."""
    (tmp_path / "mine.py").write_text(FOCAL)
    (tmp_path / "conf/trainer").mkdir(parents=True)
    (tmp_path / "conf/trainer/focal.yaml").write_text(
        "defaults: [sl, _self_]\nname: focal\nobjective: {_target_: mine.focal, gamma: 2.0}\n"
    )
    done = launch(
        "hydra.searchpath=[file://conf]", "trainer=focal", "trainer.epochs=2", "attack=none", "analysis=none",
        "logger=none", "name=r", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = {(r.split, r.metric): r.value for r in read_results(tmp_path / "runs/r/results.jsonl")}
    assert 0 < results["train", "loss"] < results["train", "surprise"]


@pytest.mark.parametrize(
    ("act", "adversary", "precision"),
    [
        (Labels(), None, "fp32"),
        (Labels(), Adversary(FGSM, 2), "fp32"),
        (EpsilonGreedy(0.1), None, "fp32"),
        (EpsilonGreedy(0.1), Adversary(FGSM, 2), "fp32"),
        (Labels(), None, "bf16"),
    ],
)
def test_every_trainer_learns(train, tmp_path, hardware, act, adversary, precision):
    select = "val_adversarial_accuracy" if adversary else "val_accuracy"
    settings = recipe(epochs=8, objective=policy(act), adversary=adversary, select=select)
    _, best = train(settings, hardware=replace(hardware, precision=precision))
    results = read_results(tmp_path / "results.jsonl")
    last = {(r.split, r.metric): r.value for r in results if r.step == 8}
    assert last["val", "accuracy"] > 0.9
    logged = {metric for split, metric in last if split == "train"}
    assert logged >= {"loss", "reward", "accuracy", "grad_norm", "lr", "images_per_second"}
    measured_under_attack = {r.step for r in results if r.metric == "adversarial_accuracy"}
    assert measured_under_attack == ({3, 4, 5, 6, 7, 8} if adversary else set())
    assert best >= (3 if adversary else 1)


def test_training_ends_when_the_validation_accuracy_is_reached(train, tmp_path):
    """best.pt is of that epoch, and a repeated call trains no further."""
    settings = recipe(epochs=8, until=0.8)
    weights, best = train(settings)
    scores = {r.step: r.value for r in read_results(tmp_path / "results.jsonl") if (r.split, r.metric) == REACHED}
    assert max(scores) == best < 8 and scores.pop(best) >= 0.8 and all(score < 0.8 for score in scores.values())
    again, best_again = train(settings)
    assert best_again == best and all(torch.equal(weights[name], again[name]) for name in weights)


REACHED = ("val", "accuracy")


def test_reward_is_the_share_of_right_actions(train, tmp_path):
    train(recipe(epochs=1, objective=policy(EpsilonGreedy(1.0))))
    reward = next(r.value for r in read_results(tmp_path / "results.jsonl") if r.metric == "reward")
    assert 0.35 < reward < 0.65  # pure exploration among two classes


def test_the_same_seed_gives_the_same_weights_to_the_bit_and_another_does_not(train, tmp_path):
    settings = recipe(objective=policy(EpsilonGreedy(0.1)))
    first, again, other = (train(settings, name, seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)])
    assert_same(tmp_path, first, again, ("a", "b"))
    assert not torch.equal(first[0]["net.5.weight"], other[0]["net.5.weight"])


def test_a_batch_size_beyond_the_data_is_all_of_it(train, tmp_path, caplog):
    with caplog.at_level("INFO", "aerl"):
        assert_same(tmp_path, train(recipe(batch_size=200), "whole"), train(recipe(batch_size=10**9), "cut"))
    assert "trainer.batch_size=1000000000" in caplog.text


class Killed(Exception):
    pass


def killed_at(step, augment):
    def dies(images, generator, calls=iter(range(100))):  # noqa: B008
        if next(calls) == step:
            raise Killed
        return augment(images, generator)

    return dies


@pytest.mark.parametrize("adversary", [None, Adversary(FGSM, 1)])
def test_a_killed_run_resumes_to_the_same_weights_and_no_line_twice(train, tmp_path, adversary, monkeypatch):
    monkeypatch.setattr("aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    settings = recipe(objective=policy(EpsilonGreedy(0.1)), adversary=adversary)
    with pytest.raises(Killed):
        train(replace(settings, augment=killed_at(2 * 6 + 3, settings.augment)), "cut")
    assert checkpoint.load(tmp_path / "cut/checkpoints/last.pt")["epoch"] == 2
    assert_same(tmp_path, train(settings, "whole"), train(settings, "cut"))


def test_a_running_baseline_and_exploration_that_decays_resume_to_the_bit(train, tmp_path, monkeypatch):
    monkeypatch.setattr("aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    act = EpsilonGreedy(0.5, final_exploration=0.0)

    def settings(**changes):
        objective = Reinforce(act=act, weight=0.0, baseline="running", decay=0.9)
        return recipe(objective=objective, act=act, **changes)

    whole, decayed = train(settings(), "whole"), settings()
    with pytest.raises(Killed):
        train(settings(augment=killed_at(2 * 6 + 3, recipe().augment)), "cut")
    assert_same(tmp_path, whole, train(decayed, "cut"))
    assert decayed.objective.average > 0.3
    constant = recipe(objective=Reinforce(act=act, weight=0.0, baseline="running", decay=0.9))
    assert not torch.equal(train(constant, "constant")[0]["net.5.weight"], whole[0]["net.5.weight"])


@pytest.mark.parametrize("at", [0.02, 0.3, 0.6, 0.9])
def test_a_flipped_bit_in_last_pt_is_refused(train, tmp_path, at, monkeypatch):
    monkeypatch.setattr("aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(Killed):
        train(recipe(augment=killed_at(6 + 3, recipe().augment)))
    last = tmp_path / "checkpoints/last.pt"
    content = bytearray(last.read_bytes())
    content[int(at * len(content))] ^= 1
    last.write_bytes(content)
    try:
        resumed = train(recipe())
    except UserError as error:
        assert "last.pt: damaged" in str(error) and "\n" not in str(error)
    else:  # in the padding between two records
        assert_same(tmp_path, train(recipe(), "whole"), resumed, ("whole", ""))


@pytest.mark.parametrize("stops", [[3], [1, 2, 9]])
def test_stopped_within_an_epoch_it_resumes_at_the_next_step_to_the_bit(train, tmp_path, monkeypatch, stops):
    """The signal arrives after so many steps of each start, with dropout and random actions."""
    settings = recipe(objective=policy(EpsilonGreedy(0.3)), epochs=3, adversary=Adversary(FGSM, 1))
    whole, steps, left, forward = train(settings, "whole"), 0, list(stops), TrainStep.forward

    def counted(*args, **options):
        nonlocal steps
        steps += 1
        if left and steps == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **options)

    monkeypatch.setattr(TrainStep, "forward", counted)
    for _ in stops:
        steps = 0
        with signals.listening(), pytest.raises(signals.Stopped) as stopped:
            train(settings, "cut")
        assert stopped.value.code == signals.REQUEUE
    with signals.listening():
        assert_same(tmp_path, whole, train(settings, "cut"))


def test_stopped_in_the_validation_it_resumes_there(train, tmp_path):
    """At once, in its adversary; the epoch's steps are not repeated."""
    settings, calls = recipe(epochs=3, adversary=Adversary(FGSM, 1)), iter(range(100))

    def stops(model, x, y, *, generator):
        if not model.training and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGHUP)
            raise AssertionError("not stopped")
        return FGSM(model, x, y, generator=generator)

    for _ in range(2):
        with signals.listening(), suppress(signals.Stopped):
            resumed = train(replace(settings, adversary=Adversary(stops, 1)), "cut")
    assert_same(tmp_path, train(settings, "whole"), resumed)


def breaking(model, at, what):
    """An `augment` that breaks `what` of the model before step number `at` of the training, counted from 0."""

    def breaks(images, generator, calls=iter(range(1000))):  # noqa: B008
        if next(calls) == at:
            what(model)
        return images

    return breaks


def nan_weight(model):
    model.net[0].weight.data.fill_(math.nan)


def one_infinite(model):
    model.net[5].weight.data[0, 0] = math.inf


def huge(model):
    model.net[5].weight.data.mul_(1e38)


def statistics(model):
    model.net[1].running_var.fill_(math.nan)


@pytest.mark.parametrize("act", [Labels(), EpsilonGreedy(0.1), EpsilonGreedy(0.1, expected=True)])
@pytest.mark.parametrize("what", [nan_weight, one_infinite, huge, statistics])
def test_what_is_not_finite_stops_training_and_keeps_the_best(train, tmp_path, hardware, what, act):
    """The best weights are written although no checkpoint was due."""
    model = hardware.place(network())
    reason = "validation's accuracy is nan" if what is statistics else "loss or gradient is not finite at step 3"
    with pytest.raises(
        UserError, match=f"training stopped at epoch 2 of 4: the {reason};.*trainer.optimizer.lr"
    ) as error:
        train(recipe(objective=policy(act), augment=breaking(model, 6 + 2, what), clip=None), model=model)
    assert "\n" not in str(error.value) and f"of epoch 1, in {tmp_path}" in str(error.value)
    weights = checkpoint.load(tmp_path / "checkpoints/best.pt")["model"]
    assert all(value.isfinite().all() for value in weights.values())
    assert {r.step for r in read_results(tmp_path / "results.jsonl")} == {1}


def test_divergence_in_the_first_epoch_leaves_no_files(train, tmp_path, hardware):
    model = hardware.place(network())
    with pytest.raises(UserError, match=r"epoch 1 of 4.* at step 3;.*best weights: none"):
        train(recipe(augment=breaking(model, 2, nan_weight)), model=model)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "results.jsonl").exists()


def test_a_signal_never_saves_weights_that_are_not_finite(train, tmp_path, hardware, monkeypatch):
    """Repeated, the run resumes from the last finite state, and reports the same again."""
    monkeypatch.setattr("aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def stop_and_break(model):
        nan_weight(model)
        os.kill(os.getpid(), signal.SIGTERM)

    for at in (6 + 2, 2):  # first from the beginning, then resumed after the first epoch
        model = hardware.place(network())
        with signals.listening(), pytest.raises(UserError, match=r"epoch 2 of 4.* at step 3;"):
            train(recipe(augment=breaking(model, at, stop_and_break)), model=model)
        state = checkpoint.load(tmp_path / "checkpoints/last.pt")
        assert state["epoch"] == 1 and "step" not in state
        assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(("in_training", "reason"), [(True, "at step 1;"), (False, "adversarial_accuracy is nan")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_adversary_whose_images_are_not_finite_stops_training(train, bad, in_training, reason):
    def attack(model, x, y, *, generator):
        return x * bad if model.training == in_training else x

    with pytest.raises(UserError, match=f"epoch 2 of 4: .*{reason}"):
        train(recipe(adversary=Adversary(attack, 1), select="last"))


def test_logits_that_are_not_finite_earn_nothing(data, hardware):
    """argmax takes NaN for the largest: class 0 would be right."""

    class Broken(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 2) + x.mean() * self.scale
            logits[1:] = math.nan
            return logits

        scale = nn.Parameter(torch.ones(()))

    y = torch.zeros(4, dtype=torch.int64)
    step = TrainStep(Broken(), policy(EpsilonGreedy(0.5)), hardware)
    loss, metrics = step(torch.rand(4, 1, 8, 8), y, stream(0))
    assert metrics["accuracy"] <= 0.25 and metrics["reward"] <= 0.25 and not loss.isfinite()
    scores = validate(Broken(), Batches(data.val, 64), hardware, None, 0)
    assert math.isnan(scores["accuracy"]) and math.isnan(scores["loss"])


class Full:
    """Out of memory at the call number `at`, then well."""

    def __init__(self, call, at=1, error=torch.OutOfMemoryError):
        self.call, self.left, self.error = call, at, error

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error("CUDA error: out of memory")
        return self.call(*args, **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("aerl.data.batches.Batches._select", 7),  # of an epoch: one is in the validation
        ("aerl.training.loop.to_unit", 7),
        ("aerl.training.loop.TrainStep.forward", 6),
        ("torch.Tensor.backward", 6),
        ("aerl.training.loop.gradient_norm", 6),
        ("torch.optim.AdamW.step", 6),
        ("aerl.training.loop._Epoch.means", 1),
        ("aerl.training.checkpoint.save", 0),
    ],
)
def test_out_of_memory_names_the_batch_size_that_halves_it(train, tmp_path, monkeypatch, where, calls, error):
    """In the second epoch, within its steps or after them: the best weights so far are kept."""
    full = Full(pkgutil.resolve_name(where), at=calls + 1, error=error)
    monkeypatch.setattr(where, (lambda *args: full(*args)) if where.split(".")[-2].strip("_")[0].isupper() else full)
    place = r"epoch 2 of 4, step 1 of 6" if calls > 1 else r"epoch [24] of 4"
    with pytest.raises(UserError, match=rf"{place}: trainer.batch_size=32: .*trainer.batch_size=16") as error:
        train(recipe())
    assert "of epoch " in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "checkpoints/best.pt").exists()


def test_validation_that_runs_out_of_memory_continues_with_half_a_batch_to_the_same_scores(data, hardware):
    """Also under an adversary that draws at random and drops fooled samples."""
    model, val = network(), Batches(data.val, 40)
    attack = partial(pgd, norm="L2", eps=0.5, steps=2, restarts=2)
    expected = validate(model, val, hardware, Adversary(attack), seed=0)
    full = Full(attack)
    assert validate(model, val, hardware, Adversary(full), seed=0) == pytest.approx(expected, rel=1e-6)
    assert full.left < -2

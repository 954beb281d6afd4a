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
from torch import nn
from torch.nn import functional as F

from aerl.attacks import BatchGenerator, pgd
from aerl.data import Batches, DataSplits, Split, augment
from aerl.models import Classifier
from aerl.runtime import signals
from aerl.runtime.device import stream
from aerl.tracking.results import ResultLog, read_results
from aerl.training import checkpoint
from aerl.training.loop import Adversary, Recipe, check_recipe, fit, learning_rate, train_step, validate
from aerl.training.objectives import EpsilonGreedy, Labels
from aerl.types import UserError

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
    settings = {
        "epochs": 4,
        "batch_size": 32,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "act": Labels(),
        "schedule": "cosine",
        "warmup": 0.1,
        "clip": 1.0,
        "augment": partial(augment, hflip=0.0, vflip=0.5, translate=0.1),
    }
    return Recipe(**(settings | changes))


def trained(folder, data, hardware, recipe, seed=0):
    model = hardware.place(network(seed))
    folder.mkdir(exist_ok=True, parents=True)
    return model, fitted(model, folder, data, recipe, hardware, seed)


def fitted(model, folder, data, recipe, hardware, seed=0):
    identity = {"run_id": "r", "seed": seed, "dataset": "d", "model": "m", "trainer": "t"}
    return fit(
        model, data, recipe, hardware, seed=seed, folder=folder / "checkpoints", results=ResultLog(folder, identity)
    )  # fmt: skip


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_supervised_step_is_cross_entropy_and_an_adversary_adds_its_weighted_loss():
    model = network().eval()  # without dropout and batch statistics the step is a plain formula
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    plain = train_step(model, x, y, Labels(), stream(0))
    torch.testing.assert_close(plain.loss, F.cross_entropy(model(x), y))
    adversary = Adversary(FGSM, weight=0.5, start_epoch=0)
    both = train_step(model, x, y, Labels(), stream(0), adversary=adversary)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    x_adv = (x + 0.05 * gradient.sign()).clamp(0, 1).detach()
    expected = F.cross_entropy(model(x_adv), y)
    torch.testing.assert_close(both.adversarial_loss, expected)
    torch.testing.assert_close(both.loss, plain.loss + 0.5 * expected)


def test_pgd_training_is_cross_entropy_on_the_examples_alone():
    """Madry et al. 2018, equation 2.1, with one step that can be written down; the clean batch is never seen."""
    model = network().eval()  # no dropout, so that the step can be done by hand
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    step = train_step(model, x, y, Labels(), stream(0), adversary=Adversary(FGSM, 1.0, 0, "alone"))
    x_adv = FGSM(model, x, y, generator=None)
    torch.testing.assert_close(step.loss, F.cross_entropy(model(x_adv), y))


def test_trades_is_clean_cross_entropy_plus_the_kl_to_the_examples():
    """Zhang et al. 2019, equation 5, against torch's own divergence; both predictions get a gradient."""
    model = network().eval()
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    settings = {"norm": "Linf", "eps": 0.05, "steps": 2, "loss": "kl", "drop_fooled": False, "keep": "last"}
    adversary = Adversary(partial(pgd, **settings), 6.0, 0, "kl")
    step = train_step(model, x, y, Labels(), stream(0), adversary=adversary)
    generator = stream(0)
    x_adv = pgd(model, x, y, generator=BatchGenerator(generator, 16), **settings)
    p, q = model(x).softmax(1), model(x_adv).log_softmax(1)
    expected = F.cross_entropy(model(x), y) + 6 * F.kl_div(q, p, reduction="batchmean")
    torch.testing.assert_close(step.loss, expected)
    gradients = torch.autograd.grad(step.loss, list(model.parameters()), retain_graph=True)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_kl_pgd_needs_a_random_start():
    model = network().eval()
    with pytest.raises(UserError, match=r"loss=kl: its gradient is zero at the clean image"):
        pgd(model, torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), generator=BatchGenerator(stream(0), 2),
            norm="L2", eps=0.1, loss="kl", random_start=False)  # fmt: skip


@pytest.mark.parametrize("mode", [True, False])
def test_the_adversary_leaves_no_trace_on_the_model(mode):
    model = network().train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    FGSM(model, x, y, generator=None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training is mode and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("act", [Labels(), EpsilonGreedy(0.1)])
@pytest.mark.parametrize("adversary", [None, Adversary(FGSM, 1.0, 2)])
def test_every_cell_of_the_two_by_two_learns(tmp_path, data, hardware, act, adversary):
    select = "val_adversarial_accuracy" if adversary else "val_accuracy"
    _, best = trained(tmp_path, data, hardware, recipe(epochs=8, act=act, adversary=adversary, select=select))
    results = read_results(tmp_path / "results.jsonl")
    last = {(r.split, r.metric): r.value for r in results if r.step == 8}
    assert last["val", "accuracy"] > 0.9
    assert {"loss", "reward", "accuracy", "grad_norm", "lr", "images_per_second"} <= {
        m for s, m in last if s == "train"
    }
    measured_under_attack = {r.step for r in results if r.metric == "adversarial_accuracy"}
    assert measured_under_attack == ({3, 4, 5, 6, 7, 8} if adversary else set())
    assert best >= (3 if adversary else 1)


def test_reward_is_the_share_of_right_actions(tmp_path, data, hardware):
    trained(tmp_path, data, hardware, recipe(epochs=1, act=EpsilonGreedy(1.0)))
    reward = next(r.value for r in read_results(tmp_path / "results.jsonl") if r.metric == "reward")
    assert 0.35 < reward < 0.65  # pure exploration among two classes


def test_the_same_seed_gives_the_same_weights_to_the_bit_and_another_does_not(tmp_path, data, hardware):
    settings = recipe(act=EpsilonGreedy(0.1))
    first, again, other = (
        trained(tmp_path / name, data, hardware, settings, seed)[0] for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("adversary", [None, Adversary(FGSM, 1.0, 1)])
def test_resuming_gives_the_undisturbed_weights_and_no_line_twice(tmp_path, data, hardware, adversary, monkeypatch):
    monkeypatch.setattr("aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    settings = recipe(act=EpsilonGreedy(0.1), adversary=adversary, epochs=4)
    whole, best = trained(tmp_path / "whole", data, hardware, settings)

    class Killed(Exception):
        pass

    def dies_in_the_third_epoch(images, generator, share=None, calls=iter(range(100))):  # noqa: B008
        if next(calls) == 2 * 6 + 3:
            raise Killed
        return settings.augment(images, generator)

    with pytest.raises(Killed):
        trained(tmp_path / "cut", data, hardware, replace(settings, augment=dies_in_the_third_epoch))
    assert checkpoint.load(tmp_path / "cut/checkpoints/last.pt")["epoch"] == 2
    resumed, best_resumed = trained(tmp_path / "cut", data, hardware, settings)
    assert equal(whole, resumed) and best == best_resumed
    kept = [
        [(r.metric, r.split, r.step, r.value) for r in read_results(tmp_path / name / "results.jsonl")
         if r.metric != "images_per_second"]
        for name in ("whole", "cut")
    ]  # fmt: skip
    assert kept[0] == kept[1]


def diverges(model, at, what):
    """An `augment` that breaks `what` of the model before step number `at` of the training, counted from 0."""

    def breaks(images, generator, share=None, calls=iter(range(1000))):  # noqa: B008
        if next(calls) == at:
            what(model)
        return images

    return breaks


def fill(name, value):
    return lambda model: model.get_parameter(name).data.fill_(value)


def one_infinite(model):
    model.net[5].weight.data[0, 0] = math.inf


def huge(model):
    model.net[5].weight.data.mul_(1e38)


def statistics(model):
    model.net[1].running_var.fill_(math.nan)


NOT_FINITE = [
    (fill("net.0.weight", math.nan), "the loss or gradient is not finite at step 3;"),
    (one_infinite, "the loss or gradient is not finite at step 3;"),
    (huge, "the loss or gradient is not finite at step 3;"),
    (statistics, r"net\.1\.running_var is not finite after step 6;"),
]


@pytest.mark.parametrize("act", [Labels(), EpsilonGreedy(0.1), EpsilonGreedy(0.1, expected=True)])
@pytest.mark.parametrize(("what", "said"), NOT_FINITE)
def test_what_is_not_finite_stops_training_names_the_place_and_keeps_the_best(
    tmp_path, data, hardware, what, said, act
):
    """However training acts. The best weights are written though no checkpoint was due."""
    model = hardware.place(network())
    settings = recipe(act=act, augment=diverges(model, 6 + 2, what), clip=None)
    with pytest.raises(UserError, match="training stopped at epoch 2 of 4.*" + said) as error:
        fitted(model, tmp_path, data, settings, hardware)
    assert "\n" not in str(error.value) and "trainer.optimizer.lr" in str(error.value)
    assert f"of epoch 1, are kept in {tmp_path}" in str(error.value)
    weights = checkpoint.load(tmp_path / "checkpoints/best.pt")["model"]
    assert all(value.isfinite().all() for value in weights.values())
    assert {r.step for r in read_results(tmp_path / "results.jsonl")} == {1}


def test_divergence_in_the_first_epoch_leaves_nothing_and_says_so(tmp_path, data, hardware):
    model = hardware.place(network())
    settings = recipe(augment=diverges(model, 2, fill("net.0.weight", math.nan)), act=EpsilonGreedy(0.1))
    with pytest.raises(UserError, match=r"epoch 1 of 4.* at step 3;.*there are no weights to keep"):
        fitted(model, tmp_path, data, settings, hardware)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "results.jsonl").exists()


def test_a_signal_never_saves_weights_that_are_not_finite(tmp_path, data, hardware, monkeypatch):
    """Repeated, the run goes on from what was finite, and says the same again."""
    monkeypatch.setattr("aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def stop_and_break(model):
        fill("net.0.weight", math.nan)(model)
        os.kill(os.getpid(), signal.SIGTERM)

    for at, epoch in ((6 + 2, 2), (2, 2)):  # once anew, then resumed after the first epoch
        model = hardware.place(network())
        settings = recipe(augment=diverges(model, at, stop_and_break))
        with signals.listening(), pytest.raises(UserError, match=rf"epoch {epoch} of 4: .* at step 3;"):
            fitted(model, tmp_path, data, settings, hardware)
        state = checkpoint.load(tmp_path / "checkpoints/last.pt")
        assert state["epoch"] == 1 and "step" not in state
        assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("in_training", "said"), [(True, "at step 1;"), (False, "the validation's adversarial_accuracy is nan")]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_adversary_whose_images_are_not_finite_stops_training(tmp_path, data, hardware, bad, in_training, said):
    def attack(model, x, y, *, generator):
        return x * bad if model.training == in_training else x

    with pytest.raises(UserError, match=f"epoch 2 of 4: .*{said}"):
        trained(tmp_path, data, hardware, recipe(adversary=Adversary(attack, 1.0, 1), select="last"))


def test_logits_that_are_not_finite_earn_nothing(data, hardware):
    """argmax takes NaN for the largest: class 0 would be right."""

    class Broken(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 2) + x.mean() * self.scale
            logits[1:] = math.nan
            return logits

        scale = nn.Parameter(torch.ones(()))

    y = torch.zeros(4, dtype=torch.int64)
    step = train_step(Broken(), torch.rand(4, 1, 8, 8), y, EpsilonGreedy(0.5), stream(0))
    assert step.correct <= 0.25 and step.reward <= 0.25 and not step.loss.isfinite()
    scores = validate(Broken(), Batches(data.val, 64), hardware, None, 0)
    assert math.isnan(scores["accuracy"]) and math.isnan(scores["loss"])


class NoRate(torch.optim.SGD):
    """An optimiser that knows no lr."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            del group["lr"]

    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.LBFGS, "trainer.optimizer: TypeError: .*closure"),
        (
            torch.optim.SparseAdam,
            "trainer.optimizer: RuntimeError: SparseAdam does not support dense gradients",
        ),
        (NoRate, "trainer.optimizer: has no lr"),
        (partial(torch.optim.SGD, lr=-1), "trainer.optimizer: Invalid learning rate: -1"),
    ],
)
def test_an_optimizer_that_cannot_step_is_found_before_training(data, optimizer, said):
    with pytest.raises(UserError, match=said) as error:
        check_recipe(recipe(optimizer=optimizer), network(), torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_learning_rate_schedules():
    factors = [learning_rate(step, 100, "linear", 0.1) for step in range(100)]
    assert factors[0] == 0 and factors[5] == pytest.approx(0.5) and factors[10] == 1
    assert factors[55] == pytest.approx(0.5) and factors[99] == pytest.approx(1 / 90)
    cosine = [learning_rate(step, 100, "cosine", 0.0) for step in range(100)]
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and cosine == sorted(cosine, reverse=True)
    assert {learning_rate(step, 100, "constant", 0.0) for step in range(100)} == {1.0}


def test_bf16_training_learns_and_its_logits_stay_fp32(tmp_path, data, hardware):
    hardware = replace(hardware, precision="bf16")
    trained(tmp_path, data, hardware, recipe(epochs=6))
    accuracies = [
        r.value for r in read_results(tmp_path / "results.jsonl") if (r.split, r.metric) == ("val", "accuracy")
    ]
    assert accuracies[-1] > 0.9
    with hardware.autocast():
        assert network()(torch.rand(2, 1, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("stops", [[3], [1, 2, 9]])
def test_stopped_within_an_epoch_it_goes_on_at_the_next_step_to_the_bit(tmp_path, data, hardware, monkeypatch, stops):
    """The signal arrives after so many steps of each start, dropout and random actions in the loop."""
    settings = recipe(act=EpsilonGreedy(0.3), epochs=3)
    whole, best = trained(tmp_path / "whole", data, hardware, settings)
    steps, left = 0, list(stops)

    def counted(*args, **options):
        nonlocal steps
        steps += 1
        if left and steps == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **options)

    monkeypatch.setattr("aerl.training.loop.train_step", counted)
    for _ in stops:
        steps = 0
        with signals.listening(), pytest.raises(signals.Stopped) as stopped:
            trained(tmp_path / "cut", data, hardware, settings)
        assert stopped.value.code == signals.REQUEUE
    with signals.listening():
        resumed, best_resumed = trained(tmp_path / "cut", data, hardware, settings)
    assert equal(whole, resumed) and best == best_resumed
    kept = [
        [(r.metric, r.step, r.value) for r in read_results(tmp_path / name / "results.jsonl")
         if r.metric != "images_per_second"]
        for name in ("whole", "cut")
    ]  # fmt: skip
    assert kept[0] == kept[1]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("call", [1, 3, 11])
def test_stopped_by_a_signal_in_the_adversary_it_goes_on_to_the_same_end(tmp_path, data, hardware, mode, call):
    """In that of a training step, and in that of the validation after it: on the spot, with nothing lost."""
    attack = partial(pgd, norm="L2", eps=0.5, steps=1, drop_fooled=True)
    settings = recipe(act=EpsilonGreedy(0.3), epochs=3, adversary=Adversary(attack, 1.0, 1))
    whole, best = trained(tmp_path / "whole", data, hardware, settings)
    left = call

    def stops(model, x, y, *, generator):
        nonlocal left
        left -= model.training == mode
        if left == 0 and model.training == mode:
            left -= 1
            os.kill(os.getpid(), signal.SIGHUP)
            raise AssertionError("went on")
        return attack(model, x, y, generator=generator)

    cut = replace(settings, adversary=Adversary(stops, 1.0, 1))
    for _ in range(2):
        with signals.listening(), suppress(signals.Stopped):
            resumed, best_resumed = trained(tmp_path / "cut", data, hardware, cut)
    assert equal(whole, resumed) and best == best_resumed
    kept = [
        [(r.metric, r.step, r.value) for r in read_results(tmp_path / name / "results.jsonl")
         if r.metric != "images_per_second"]
        for name in ("whole", "cut")
    ]  # fmt: skip
    assert kept[0] == kept[1]


def test_a_batch_size_beyond_the_data_is_all_of_it_and_said(tmp_path, data, hardware, caplog):
    whole, _ = trained(tmp_path / "whole", data, hardware, recipe(batch_size=200))
    with caplog.at_level("INFO", "aerl"):
        more, _ = trained(tmp_path / "more", data, hardware, recipe(batch_size=10**9))
    assert equal(whole, more)
    assert "trainer.batch_size=1000000000: every batch is all 200 training images" in caplog.text


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
    "where",
    [
        "aerl.training.loop.train_step",
        "torch.nn.utils.clip_grad_norm_",
        "torch.optim.AdamW.step",
        "torch.Tensor.backward",
    ],
)
def test_out_of_memory_names_the_batch_size_that_halves_it(tmp_path, data, hardware, monkeypatch, where, error):
    """In the second epoch: the best weights so far are kept."""
    monkeypatch.setattr(where, full := Full(pkgutil.resolve_name(where), at=8, error=error))
    if where.endswith(("step", "backward")) and "torch" in where:
        monkeypatch.setattr(where, lambda self, *args: full(self, *args))
    with pytest.raises(UserError, match=r"epoch 2 of 4, step 2 of 6: trainer.batch_size=32: .*=16 takes") as told:
        trained(tmp_path, data, hardware, recipe())
    assert "of epoch 1, are kept" in str(told.value) and "\n" not in str(told.value)
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["epoch"] == 1


def test_validation_that_runs_out_of_memory_goes_on_with_half_a_batch_to_the_same_scores(data, hardware):
    """Also under an adversary that draws at random and drops whom it has fooled."""
    model = network()
    attack = partial(pgd, norm="L2", eps=0.5, steps=2, restarts=2)
    val = Batches(data.val, 40)
    whole = validate(model, val, hardware, Adversary(attack, 1.0, 0), seed=0)
    full = Full(attack)
    assert validate(model, val, hardware, Adversary(full, 1.0, 0), seed=0) == pytest.approx(whole, rel=1e-6)
    assert full.left < -2

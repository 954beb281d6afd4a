"""How time grows with samples, steps, classes and runs, and what the grid of the paper's table would cost.

Growth is reported as an exponent: of t = c n^a fitted to medians, a = 1 being linear.
"""

import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from aerl.attacks import BatchGenerator, SampleGenerator, pgd
from aerl.data import Split, to_unit
from aerl.evaluation import evaluate
from aerl.models import AliCNN, Classifier
from aerl.runtime.device import Hardware
from benchmarks.paired import Timed, time_in_turns, timed
from benchmarks.training import (
    TRAINERS,
    Work,
    aerls_loop,
    bare_step,
    classifier,
    flops,
    operations,
    random_split,
    works,
)

_ROOT = Path(__file__).resolve().parent.parent
_LINEAR = 1.1  # an exponent above this is named


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth(
    what: str,
    call: Callable[[int], object],
    sizes: list[int],
    rounds: int,
    expected: float = 1,
    warm_up: bool = True,
) -> tuple[str, str, str]:
    """A row of (what, measured, goal) of `call(size)`, the sizes in turns."""
    seconds = time_in_turns({str(size): partial(call, size) for size in sizes}, rounds, warm_up=warm_up)
    medians = [statistics.median(times) for times in seconds.values()]
    slope = exponent(sizes, medians)
    measured = f"exponent {slope:.2f} ({' / '.join(f'{each:.2g}' for each in medians)} s)"
    if slope > _LINEAR:
        measured += ", faster than linear"
    return f"{what}, {' / '.join(map(str, sizes))}", measured, f"<= {expected + _LINEAR - 1:.1f}"


def measure(hardware: Hardware, rounds: int, scratch: Path, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal); the attacks drop no sample, so that all have the same work."""
    torch.backends.cudnn.benchmark = False
    n, steps, batch = (2, 1, 8) if smoke else (256, 10, 64) if hardware.device.type == "cuda" else (64, 5, 64)
    model = classifier(Work("alicnn", "sl", batch, 32), hardware)
    split = random_split(4 * n, 32)
    clean = evaluate.predict(model, split, hardware, batch)
    split = Split(split.images, torch.from_numpy(clean.pred))

    def attacked(count: int) -> None:
        some = Split(split.images[:count], split.labels[:count])
        found = evaluate.predict(model, some, hardware, batch)
        attack = partial(pgd, eps=1.0, steps=steps, drop_fooled=False)
        evaluate.run_attack(attack, model, some, found, hardware, name="pgd", seed=0, batch_size=batch)

    rows = [
        growth(f"PGD-{steps}, AliCNN: test samples", attacked, [n, 2 * n, 4 * n], rounds),
        growth(
            f"PGD, AliCNN, {n} images: steps", partial(_pgd, model, split, n, hardware), [steps, 2 * steps, 4 * steps],
            rounds,
        ),
    ]  # fmt: skip
    classes = [10, 100, 1000]
    wide = {count: _of_classes(count, hardware) for count in classes}
    rows.append(
        growth(
            f"PGD-{steps}, AliCNN, {n} images: classes",
            lambda count: _pgd(wide[count], split, n, hardware, steps), classes, rounds, expected=0,
        )
    )  # fmt: skip
    bare = {count: _step_of_classes(wide[count], batch, hardware) for count in classes}
    rows.append(
        growth(
            f"training step, AliCNN, batch {batch}: classes",
            lambda count: bare[count](),
            classes,
            rounds,
            expected=0,
        )
    )
    runs = [1, 2] if smoke else [1, 2, 4]
    rows.append(growth("a multirun of digits: runs", partial(_multirun, scratch / "sweep"), runs, 1, warm_up=not smoke))
    return [*rows, *headline_rows(hardware, rounds, scratch, smoke)]


def _pgd(model: Classifier, split: Split, count: int, hardware: Hardware, steps: int) -> Tensor:
    x = to_unit(split.images[:count].to(hardware.device), hardware.memory_format)
    y = split.labels[:count].to(hardware.device)
    noise = SampleGenerator.for_images(x, 0)
    return pgd(model, x, y, generator=noise, eps=1.0, steps=steps, drop_fooled=False)


def _of_classes(count: int, hardware: Hardware) -> Classifier:
    net = AliCNN(num_classes=count, channels=3, size=(32, 32))
    return hardware.place(Classifier(net, (0.5,) * 3, (0.25,) * 3))


def _step_of_classes(model: Classifier, batch: int, hardware: Hardware) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.rand(batch, 3, 32, 32).to(hardware.device, memory_format=hardware.memory_format)
    y = torch.zeros(batch, dtype=torch.long, device=hardware.device)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _multirun(folder: Path, runs: int) -> None:
    """The whole command, once more from the beginning."""
    words = [
        "-m", f"seed={','.join(map(str, range(runs)))}", "trainer.epochs=1", "attack=pgd", "attack.pgd.steps=2",
        "analysis=none", "logger=none", "overwrite=true", f"runs_dir={folder}", f"data_dir={folder.parent / 'data'}",
    ]  # fmt: skip
    subprocess.run([sys.executable, str(_ROOT / "launch.py"), *words], check=True, capture_output=True)


# --- The paper's table, on paper --------------------------------------------------------------------------

_EPOCHS = 100
_IMAGES = {"cifar10": (45_000, 10_000), "cifar100": (45_000, 10_000), "imagenet100": (114_021, 5_000)}
_ADVERSARIAL = 0.333  # of rl_adv's epochs, by conf/trainer/rl_adv.yaml
# Passes over an image, a backward one counting two, as docs/performance.md counts them: `pgd_paper` makes 100
# steps on all, the suite 30 on those that are right and 13,000 more on those that withstand it.
_PAPER, _SUITE, _WITHSTOOD = 300, 30, 13_000
# Shares that withstood the worst case, from the means of docs/results.md; on other data, of another net.
_ROBUST = {"sl": 0.008, "rl": 0.011, "rl_adv": 0.080}
_ASSUMED = 1e14  # operations a second that a GPU sustains, where none is there to be measured


def headline(
    images_per_second: Mapping[str, float], passes_per_second: float, robust: Mapping[str, float] = _ROBUST
) -> list[float]:
    """Hours of each run of multirun_sweeps/headline.yaml: training and attacks, without the analyses.

    `images_per_second` are the 6-layer CNN's in training by trainer; rl_adv's is with its adversary.
    `passes_per_second` are forward passes over an image in an attack, a backward one counting two.
    """
    grid = yaml.safe_load((_ROOT / "multirun_sweeps/headline.yaml").read_text())["hydra"]["sweeper"]["params"]
    trainers, datasets = (grid[key].split(",") for key in ("trainer", "dataset"))
    hours = []
    for trainer in trainers:
        for dataset in datasets:
            train, test = _IMAGES[dataset]
            seconds_an_image = 1 / images_per_second[trainer]
            if trainer == "rl_adv":
                seconds_an_image = (
                    _ADVERSARIAL / images_per_second["rl_adv"] + (1 - _ADVERSARIAL) / images_per_second["rl"]
                )
            passes = test * (_PAPER + _SUITE + robust[trainer] * _WITHSTOOD)
            seconds = _EPOCHS * train * seconds_an_image + passes / passes_per_second
            hours += [seconds / 3600] * len(str(grid["seed"]).split(","))
    return hours


def makespan(hours: list[float], workers: int) -> float:
    """Hours until all runs are done, each on one of `workers`, the longest first."""
    busy = [0.0] * workers
    for run in sorted(hours, reverse=True):
        busy[busy.index(min(busy))] += run
    return max(busy)


def headline_rows(hardware: Hardware, rounds: int, scratch: Path, smoke: bool) -> list[tuple[str, str, str]]:
    """What the grid would cost on this machine, from the speeds of the 6-layer CNN measured here.

    Without a GPU also what it would cost on one, from the operations counted and an assumed speed.
    """
    candidates: dict[str, Callable[[], object]] = {}
    three = works("cnn", hardware, smoke)
    for work in three:
        step = bare_step(work, hardware)
        timed(step)
        steps = 1 if smoke else max(1, min(100, math.ceil(2 / timed(step).seconds)))
        candidates[work.trainer] = aerls_loop(work, hardware, scratch / "headline" / work.trainer, steps)
    batch, steps = (4, 2) if smoke else (512, 20) if hardware.device.type == "cuda" else (128, 3)
    model, split = classifier(three[0], hardware), random_split(batch, 32)
    x = to_unit(split.images.to(hardware.device), hardware.memory_format)
    y = split.labels.to(hardware.device)
    attack = partial(
        pgd, model, x, y, generator=BatchGenerator(torch.Generator(), len(x)), eps=1.0, steps=steps, random_start=False,
        drop_fooled=False,
    )  # fmt: skip
    candidates["attack"] = lambda: Timed(timed(attack).seconds)
    seconds = time_in_turns(candidates, rounds)
    speeds = {work.trainer: work.batch_size / statistics.median(seconds[work.trainer]) for work in three}
    passes = batch * (3 * steps + 1) / statistics.median(seconds["attack"])
    hours = headline(speeds, passes)
    gpu = hardware.device.type == "cuda"
    rates = ", ".join(f"{name} {speeds[name]:,.0f}" for name in TRAINERS)
    cost = _on_gpus(hours) if gpu else f"{sum(hours):,.0f} hours of this CPU"
    cost += f" (measured: {rates} images/s in training, {passes:,.0f} passes/s in attacks)"
    rows = [(f"EXTRAPOLATED, not run: multirun_sweeps=headline, {len(hours)} runs", cost, "")]
    if not gpu:
        training = {work.trainer: _ASSUMED / operations(work) for work in three}
        model.eval()  # BatchNorm has nothing to normalise one image by
        hours = headline(training, _ASSUMED / flops(partial(model, x[:1])))
        cost = f"{_on_gpus(hours)} ({sum(hours) * 3600 * _ASSUMED:.2g} operations)"
        rows.append((f"the same on GPUs, by counting, at an ASSUMED {_ASSUMED / 1e12:.0f} TFLOP/s", cost, ""))
    return rows


def _on_gpus(hours: list[float]) -> str:
    """A run is one job and takes one GPU: more GPUs than runs stay idle."""
    return (
        f"{sum(hours):,.1f} GPU hours; {makespan(hours, 64):,.1f} h on 64 GPUs, "
        f"of which {min(64, len(hours))} have work"
    )

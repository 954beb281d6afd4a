"""Where the time of the two hottest paths goes, by torch.profiler: `python -m benchmarks.profile`.

A training step of the 6-layer CNN as aerl makes it, and PGD on it; the operators by their own time.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from aerl.attacks import BatchGenerator, pgd
from aerl.data import Batches, to_unit
from aerl.runtime import device
from aerl.runtime.device import Hardware, stream
from aerl.training.loop import TrainStep, gradient_norm
from benchmarks.training import TRAINERS, Work, classifier, random_split, recipe


def training(machine: Hardware, work: Work) -> Callable[[], object]:
    """One step, as the body of the loop in `aerl.training.loop.fit`."""
    model, plain = classifier(work, machine), recipe(work)
    train_step = TrainStep(model, plain.objective, machine)
    attack = plain.adversary.attack if plain.adversary else None
    optimizer = plain.optimizer(model.parameters())
    batches = Batches(random_split(2 * work.batch_size, work.size), work.batch_size, machine.device)
    generator = stream(0, "actions", device=machine.device)
    model.train()

    def step() -> None:
        images, y = next(iter(batches.epoch(torch.Generator())))
        x = to_unit(plain.augment(images, generator), machine.memory_format)
        optimizer.zero_grad()
        train_step(x, y, generator, attack)[0].backward()
        gradient_norm(model, plain.clip)
        optimizer.step()

    return step


def attack(machine: Hardware, work: Work, steps: int) -> Callable[[], object]:
    model, split = classifier(work, machine), random_split(work.batch_size, work.size)
    x = to_unit(split.images.to(machine.device), machine.memory_format)
    y = split.labels.to(machine.device)
    return partial(pgd, model, x, y, generator=BatchGenerator(torch.Generator(), len(x)), eps=1.0, steps=steps,
                   random_start=False, drop_fooled=False)  # fmt: skip


def operators(call: Callable[[], object], machine: Hardware) -> list[tuple[str, float, int]]:
    """(operator, seconds of its own, calls), the longest first; after one call that is not looked at."""
    call()
    cuda = machine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        call()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [(event.key, getattr(event, key) / 1e6, event.count) for event in profiler.key_averages()]
    return sorted(found, key=lambda each: each[1], reverse=True)


def show(what: str, found: list[tuple[str, float, int]], rows: int = 12) -> None:
    total = sum(seconds for _, seconds, _ in found)
    inside = sum(seconds for name, seconds, _ in found if "conv" in name)
    print(f"\n{what}: {total:.3g} s, convolutions {inside / total:.0%}\n")
    print("| operator | own time | share | calls |\n|---|---|---|---|")
    for name, seconds, calls in found[:rows]:
        print(f"| {name} | {1000 * seconds:.3g} ms | {seconds / total:.1%} | {calls} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="of PGD")
    parser.add_argument("--width", type=float, default=1.0, help="of the net; 1 is the paper's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training")
    args = parser.parse_args()
    machine = device.set_up(device="auto", precision=args.precision, tf32=False, channels_last=True,
                              compile=False, threads=None, deterministic=False)  # fmt: skip
    for trainer in TRAINERS:
        work = Work("cnn", trainer, args.batch_size, 32, args.width)
        show(f"training step: {work}", operators(training(machine, work), machine))
    show(f"PGD, {args.steps} steps: {work.shape}", operators(attack(machine, work, args.steps), machine))


if __name__ == "__main__":
    main()

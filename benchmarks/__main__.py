"""Every promise of speed and memory, measured side by side in one run: `python -m benchmarks [--smoke]`."""

import argparse
import datetime
import platform
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aerl.runtime import device
from benchmarks import (
    analyses,
    attacks,
    evaluation,
    memory,
    python,
    recipes,
    referee,
    scaling,
    startup,
    training,
)
from benchmarks.victim import images_32, trained

PARTS = (
    "startup", "python", "training", "recipes", "attacks", "autoattack", "referee", "memory", "scaling", "analyses",
    "evaluation",
)  # fmt: skip
Rows = list[tuple[str, str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--rounds", type=int, default=5, help="how often the candidates take turns")
    parser.add_argument("--cifar10", type=Path, help="a local copy of CIFAR-10; without it digits at 3x32x32")
    parser.add_argument("--imagenet100", type=Path, help="a local copy of ImageNet-100, for memory at 224x224")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--net", choices=training.NETS, action="append", help="of training; may be repeated")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of aerl's training")
    parser.add_argument("--tf32", action="store_true", help="in aerl's training; PyTorch's default is a half of it")
    parser.add_argument("--compile", action="store_true", help="torch.compile aerl's training and the bare step")
    parser.add_argument("--out", type=Path, help="append the table to this file, as Markdown")
    args = parser.parse_args()

    machine = device.set_up(
        device="auto", precision=args.precision, tf32=args.tf32, channels_last=True, compile=args.compile,
        threads=None, deterministic=False,
    )  # fmt: skip
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one for each candidate, more than any one program has
    rounds = 1 if args.smoke else args.rounds
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(args, machine, rounds, Path(scratch))
    show(rows, args, machine, rounds)


def measure(args: argparse.Namespace, machine: device.Hardware, rounds: int, scratch: Path) -> Rows:
    parts, smoke, gpu = args.only or PARTS, args.smoke, machine.device.type == "cuda"
    rows: Rows = []
    if "startup" in parts:
        rows += startup.measure(rounds, scratch / "startup", smoke)
    if "python" in parts:
        rows += python.measure(rounds, scratch / "python", smoke)
    if "training" in parts:
        rows += training.measure(tuple(args.net or training.NETS), machine, rounds, scratch / "training", smoke)
    if "recipes" in parts:
        rows += recipes.measure(machine, rounds, scratch / "recipes", smoke)
    if {"attacks", "autoattack", "referee", "analyses"} & set(parts):
        data = images_32(args.cifar10, scratch)
        images = {"undefended": 64, "pgd_at": 64} if smoke else {"undefended": 8_000, "pgd_at": 4_000}
        models = {name: trained(data, machine, scratch, count, name) for name, count in images.items()}
    if "attacks" in parts:
        samples, steps = (8, 2) if smoke else (1_000, 100) if gpu else (64, 100)
        rows += attacks.measure(models, data, machine, rounds, samples=samples, steps=steps)
    if "autoattack" in parts:
        # The library spends some 13,000 passes on a sample that withstands it: there are fewer of the defended.
        many = {"undefended": 4, "pgd_at": 1} if smoke else {"undefended": 64, "pgd_at": 32}
        many = {"undefended": 1_000, "pgd_at": 250} if gpu and not smoke else many
        rows += attacks.measure_autoattack(models, data, machine, rounds, samples=many)
    if "referee" in parts:
        samples, steps = (8, 2) if smoke else (1_000, 100) if gpu else (64, 100)
        rows += referee.measure(models, data, machine, rounds, samples=samples, steps=steps)
    if "memory" in parts:
        rows += memory.measure(machine, scratch, args.cifar10, args.imagenet100, smoke)
    if "scaling" in parts:
        rows += scaling.measure(machine, rounds, scratch, smoke)
    if "analyses" in parts:
        rows += analyses.measure(models["undefended"], data, machine, rounds, scratch, smoke)
    if "evaluation" in parts:
        rows += evaluation.measure(args.cifar10, scratch / "evaluation", rounds, smoke)
    return rows


def show(rows: Rows, args: argparse.Namespace, machine: device.Hardware, rounds: int) -> None:
    about = device.describe(machine)
    where = ", ".join(
        [
            about["device"],
            about.get("cpu", platform.machine()),
            f"Python {about['python']}",
            f"torch {about['torch']}",
        ]
    )
    today = datetime.date.today().isoformat()
    images = "CIFAR-10" if args.cifar10 else "digits at 3x32x32"
    how = f"training in {args.precision}{' with TF32' * args.tf32}{', compiled' * args.compile}"
    title = (
        f"{today}; {where}; {how}; ratios are medians of {rounds} rounds in turn; attacked images: {images}"
        f"{'; SMOKE: sizes too small to mean anything' * args.smoke}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("what", "measured", "goal"):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
    if args.out is not None:
        lines = [f"\n{title}\n", "| what | measured | goal |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

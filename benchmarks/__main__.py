"""Every promise of speed and memory, measured side by side in one run: `python -m benchmarks [--smoke]`."""

import argparse
import datetime
import os
import platform
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aerl import hardware
from benchmarks import analyses, attacks, judging, memory, startup, training
from benchmarks.victim import images_32, trained

PARTS = ("startup", "training", "attacks", "analyses", "judging", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--rounds", type=int, default=5, help="how often the candidates take turns")
    parser.add_argument("--cifar10", type=Path, help="a local copy of CIFAR-10; without it digits at 3x32x32")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--out", type=Path, help="append the table to this file, as Markdown")
    args = parser.parse_args()

    machine = hardware.set_up(
        device="auto", precision="fp32", tf32=False, channels_last=True, compile=False, threads=None,
        deterministic=False,
    )  # fmt: skip
    rounds = 1 if args.smoke else args.rounds
    parts = args.only or PARTS
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if "startup" in parts:
            rows += startup.measure(rounds)
        if "training" in parts:
            rows += training.measure(machine, rounds, args.smoke)
        if {"attacks", "analyses"} & set(parts):
            data = images_32(args.cifar10, Path(scratch))
            model = trained(data, machine, Path(scratch), images=500 if args.smoke else 8_000)
        if "attacks" in parts:
            samples, steps = (16, 3) if args.smoke else (128, 20)
            rows += attacks.measure(model, data, machine, rounds, samples=samples, steps=steps)
        if "analyses" in parts:
            rows += analyses.measure(model, data, machine, rounds, Path(scratch), args.smoke)
        if "judging" in parts:
            rows += judging.measure(args.cifar10, Path(scratch), rounds, args.smoke)
        if "memory" in parts and args.cifar10 is not None:
            rows += memory.measure(args.cifar10, Path(scratch))
    show(rows, args, machine, rounds)


def show(
    rows: list[tuple[str, str, str]], args: argparse.Namespace, machine: hardware.Hardware, rounds: int
) -> None:
    about = hardware.describe(machine)
    where = f"{about['device']}, {os.cpu_count()} cores, {platform.machine()}, torch {about['torch']}"
    today = datetime.date.today().isoformat()
    images = "CIFAR-10" if args.cifar10 else "digits at 3x32x32"
    title = f"{today}; {where}; ratios are medians of {rounds} rounds in turn; attacked images: {images}"
    table = Table(title=title, title_justify="left")
    for name in ("what", "measured", "goal"):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    if args.out is not None:
        lines = [f"\n{title}\n", "| what | measured | goal |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

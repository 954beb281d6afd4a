"""The tables of docs/results.md at the paper's scale: `python -m benchmarks.results` trains, judges, verifies, writes.

Every step is a command of launch.py, so a repeated call resumes where it stopped. The 6-layer CNN needs a GPU; `--train
model=alicnn` is the largest that two CPU cores train in hours.
"""

import argparse
import csv
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from aerl.tracking.results import read_results

_ROOT = Path(__file__).resolve().parent.parent
# Each trainer by the overrides that follow the paper.
# `rl_bare` is rl_readme as its scripts for CIFAR-100 and ImageNet-100 are: without normalisation.
TRAINERS = {
    "sl": ["experiment=paper_sl"],
    "rl": ["experiment=paper_rl"],
    "rl_readme": ["experiment=paper_rl_readme"],
    "rl_bare": ["experiment=paper_rl_readme", "trainer.name=rl_bare", "model.mean=[0]", "model.std=[1]"],
    "rl_fgsm": ["experiment=paper_rl_readme", "trainer.name=rl_fgsm", "trainer.act.coin=sample",
                "trainer.probability_floor=0"],
    "sl_until": ["experiment=paper_sl", "trainer.name=sl_until"],  # and trainer.until, see `train`
    "sl_operations": ["experiment=paper_sl", "trainer.name=sl_operations", "trainer.epochs=183"],  # those of rl_readme
    "sl_adv": ["experiment=paper_sl_readme"],
    "rl_adv": ["experiment=paper_rl_adv"],
    "rl_expected": ["experiment=paper_rl", "trainer.name=rl_expected", "trainer.act.expected=true"],
    "rl_trades": ["trainer=rl_trades", "model=cnn"],
    "pgd_at": ["trainer=pgd_at", "model=cnn"],
}  # fmt: skip
STEPS = ("train", "judge", "withheld", "matrix", "figures", "verify", "write")


def launch(*words: str) -> None:
    print("+ launch.py", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, str(_ROOT / "launch.py"), *words], check=True)


def train(args: argparse.Namespace, trainer: str, seed: int) -> None:
    """`sl_until` ends at the validation accuracy of the rl with the same seed, which must be trained before."""
    words = [*TRAINERS[trainer], f"dataset={args.dataset}", *args.train]
    if args.data:
        words.append(f"dataset.path={args.data}")
    if trainer == "sl_until":
        results = read_results(args.runs / f"rl-{seed}" / "results.jsonl")
        best = max(r.value for r in results if (r.split, r.metric) == ("val", "accuracy"))
        words.append(f"trainer.until={best:g}")
    launch(*words, f"eps={args.eps}", f"seed={seed}", "attack=none", "analysis=none",
           f"runs_dir={args.runs}", f"name={trainer}-{seed}")  # fmt: skip


def evaluate(args: argparse.Namespace, trainer: str, seed: int, name: str, *words: str) -> None:
    launch("trainer=none", f"checkpoint={args.runs}/{trainer}-{seed}", f"seed={seed}", f"eps={args.eps}",
           f"evaluation.samples={args.samples}", *args.judge, *words, f"runs_dir={args.runs}",
           f"name={name}-{seed}")  # fmt: skip


def judge(args: argparse.Namespace, trainer: str, seed: int) -> None:
    """The paper's attack, the suite with its adaptive attack, transfer from the others; can it be relied on?"""
    others = [name for name in args.trainers if name != trainer]
    attacks = "attack=[pgd_paper,suite,transfer]" if others else "attack=[pgd_paper,suite]"
    sources = [f"attack.transfer.sources={_folders(args, others, seed)}"] if others else []
    analyses = "analysis=[pictures,masking,planted,distance]"
    evaluate(args, trainer, seed, f"judged-{trainer}", attacks, *sources, analyses)


def withheld(args: argparse.Namespace, trainer: str, seed: int) -> None:
    """Without the normalisation of the training, as the paper's attack scripts do."""
    lost = "evaluation.withhold_normalization=true"
    evaluate(args, trainer, seed, f"withheld-{trainer}", "attack=[pgd_paper,pgd]", "analysis=none", lost)


def matrix(args: argparse.Namespace, seed: int) -> None:
    runs = f"analysis.transfer_matrix.runs={_folders(args, args.trainers, seed)}"
    evaluate(args, args.trainers[0], seed, "matrix", "attack=none", "analysis=transfer_matrix", runs)


def figures(args: argparse.Namespace, seed: int) -> None:
    """The loss around the images and the gradients along PGD, of all trainers side by side."""
    own, *others = args.trainers
    runs = _folders(args, others, seed)
    evaluate(args, own, seed, "figures", "attack=none", "analysis=[landscape,gradients]",
             f"analysis.landscape.runs={runs}", f"analysis.gradients.runs={runs}")  # fmt: skip


def verify(args: argparse.Namespace) -> None:
    runs = [str(args.runs / f"{kind}-{name}-{seed}") for kind in ("judged", "withheld")
            for name in args.trainers for seed in args.seeds]  # fmt: skip
    subprocess.run([sys.executable, "-m", "aerl.verify", *runs], check=True, cwd=_ROOT, stdout=sys.stderr)


def _folders(args: argparse.Namespace, trainers: Sequence[str], seed: int) -> str:
    return f"[{','.join(str(args.runs / f'{name}-{seed}') for name in trainers)}]"


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    if values["status"] != "finished":
        raise SystemExit(f"{folder} is {values['status']}: repeat the command without --only")
    return values


def _share(accuracy: dict[str, float]) -> str:
    return f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})"


def robustness(args: argparse.Namespace) -> list[str]:
    """One row for each model: every accuracy in %, with its 95 % interval."""
    lines = [
        "| trainer | seed | epoch | clean | pgd_paper | worst transfer | worst case | p_y = 1 | planted found "
        "| mean distance | audit | without normalisation: clean | pgd_paper |",
        "|---" * 13 + "|",
    ]
    for trainer in args.trainers:
        for seed in args.seeds:
            trained, run, lost = (
                summary(args.runs / f"{kind}{trainer}-{seed}") for kind in ("", "judged-", "withheld-")
            )
            attacks = run["attacks"]
            transfers = {
                name: attack["robust_accuracy"]
                for name, attack in attacks.items()
                if attack["of"] == "transfer" and not name.endswith("_refined")
            }
            worst = min(transfers, key=lambda name: transfers[name]["value"], default="")
            outcomes = np.load(args.runs / f"judged-{trainer}-{seed}" / "outcomes.npz")
            right = outcomes["clean_pred"] == outcomes["label"]
            certain = int((right & (outcomes["clean_p"] == 1)).sum())
            planted, masking = run["planted"]["found"], run["masking"]
            cells = [trainer, str(seed), str(trained["best_epoch"]), _share(run["clean_accuracy"])]
            cells += [_share(attacks["pgd_paper"]["robust_accuracy"])]
            cells += [
                f"{_share(transfers[worst])} from {worst.removeprefix('transfer_').removesuffix(f'_seed{seed}')}"
                if worst
                else "-"
            ]
            cells += [_share(run["worst_case_accuracy"]), f"{certain} of {int(right.sum())}"]
            cells += [f"{round(planted['value'] * planted['n'])} of {planted['n']}", f"{run['distance']['mean']:.3f}"]
            cells += [masking["verdict"]]
            cells += [_share(lost["clean_accuracy"]), _share(lost["attacks"]["pgd_paper"]["robust_accuracy"])]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def transfers(args: argparse.Namespace) -> list[str]:
    """The source x target matrix, the mean over seeds of accuracies in % on all images."""
    cells: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        with (args.runs / f"matrix-{seed}" / "tables/transfer_matrix.csv").open() as file:
            for row in csv.DictReader(file):
                pair = (row["source"].rpartition("_seed")[0], row["target"].rpartition("_seed")[0])
                cells.setdefault(pair, []).append(float(row["accuracy"]))
    names = list(dict.fromkeys(source for source, _ in cells))
    lines = [f"| crafted on \\ evaluated on | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for source in names:
        shares = [f"{100 * np.mean(cells[source, target]):.1f}" for target in names]
        lines.append(f"| {source} | {' | '.join(shares)} |")
    return lines


def write(args: argparse.Namespace) -> None:
    environment = summary(args.runs / f"judged-{args.trainers[0]}-{args.seeds[0]}")["environment"]
    trained = f"; trained with {' '.join(args.train)}" if args.train else ""
    title = (
        f"{datetime.date.today().isoformat()}; {environment['device']}, torch {environment['torch']}; {args.dataset}, "
        f"L2 eps {args.eps:g}, {args.samples} test images, seeds {', '.join(map(str, args.seeds))}{trained}; "
        "accuracies in %, in brackets the 95 % interval over the images"
    )
    parts = [[title], robustness(args)] + ([transfers(args)] if len(args.trainers) > 1 else [])
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10", help="also cifar100, imagenet100 or, to try this, digits")
    parser.add_argument("--data", type=Path, help="a local copy of it; without one it is downloaded")
    parser.add_argument("--eps", type=float, default=1.0, help="L2")
    parser.add_argument(
        "--train", nargs="+", default=[], metavar="KEY=VALUE",
        help="overrides of every training, such as model=alicnn hardware=fast",
    )  # fmt: skip
    parser.add_argument("--judge", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every evaluation")
    parser.add_argument("--samples", type=int, default=500, help="test images that are attacked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trainers", nargs="+", default=["sl", "rl", "rl_readme", "sl_until"], choices=TRAINERS)
    parser.add_argument("--jobs", type=int, default=1, help="trainings, and then evaluations, side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown")
    args = parser.parse_args()
    late = {"sl_until"}  # needs what another one reached
    pairs = [(trainer, seed) for seed in args.seeds for trainer in args.trainers]
    work: list[tuple[str, Callable[..., None], list[tuple[Any, ...]]]] = [
        ("train", train, [pair for pair in pairs if pair[0] not in late]),
        ("train", train, [pair for pair in pairs if pair[0] in late]),
        ("judge", judge, pairs),
        ("withheld", withheld, pairs),
        ("matrix", matrix, [(seed,) for seed in args.seeds] if len(args.trainers) > 1 else []),
        ("figures", figures, [(seed,) for seed in args.seeds[:1]] if len(args.trainers) > 1 else []),
        ("verify", verify, [()]),
        ("write", write, [()]),
    ]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for step, function, calls in work:
            if step in args.only:
                for done in [pool.submit(function, args, *call) for call in calls]:
                    done.result()
    finally:  # interrupted, what has not begun does not begin; the runs that have save and end
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()

"""The table of docs/results.md: train, evaluate, compare, write. `python -m benchmarks.results --cifar10 FOLDER`

Every step is a command of launch.py, so a repeated call resumes where it stopped. `--paper` does the same with the
6-layer CNN at the paper's settings, for a GPU.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
TRAINERS = ("sl", "sl_adv", "rl", "rl_adv", "rl_expected", "pgd_at")
SOURCES = ("sl", "sl_adv", "rl", "rl_adv")  # of the paper's transfer matrix
_PAPER = {
    **{name: [f"experiment=paper_{name}"] for name in SOURCES},
    "rl_expected": ["experiment=paper_rl", "trainer.act.expected=true"],
    "pgd_at": ["dataset=cifar10", "model=cnn", "trainer=pgd_at"],
}
SEEN = ("sl", "rl", "rl_adv")  # whose figures are shown
STEPS = ("train", "evaluate", "audit", "matrix", "figures", "write")


def launch(*words: str) -> None:
    print("+ launch.py", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, str(_LAUNCH), *words], check=True)


def train(args: argparse.Namespace, trainer: str, seed: int) -> None:
    what = _PAPER[trainer] if args.paper else ["dataset=cifar10_small", f"trainer={trainer}"]
    where = [f"dataset.path={args.cifar10}"] if args.cifar10 else []
    launch(*what, *args.train, *where, f"eps={args.eps}", f"seed={seed}", "attack=none", "analysis=none",
           f"runs_dir={args.runs}", f"name={trainer}-{seed}")  # fmt: skip


def sources(args: argparse.Namespace, *, without: str | None = None) -> list[str]:
    """Of the trainers that are compared here, those whose examples are transferred."""
    return [name for name in SOURCES if name in args.trainers and name != without]


def _folders(args: argparse.Namespace, trainers: Sequence[str], seed: int) -> str:
    return f"[{','.join(str(args.runs / f'{name}-{seed}') for name in trainers)}]"


def evaluate(args: argparse.Namespace, trainer: str, seed: int) -> None:
    others = _folders(args, sources(args, without=trainer), seed)
    launch("trainer=none", f"checkpoint={args.runs}/{trainer}-{seed}", f"seed={seed}", f"eps={args.eps}",
           f"evaluation.samples={args.samples}", "attack=[pgd_paper,pgd,autoattack,transfer]",
           f"attack.transfer.sources={others}", "analysis=none",
           f"runs_dir={args.runs}", f"name=evaluated-{trainer}-{seed}")  # fmt: skip


def audit(args: argparse.Namespace, trainer: str, seed: int) -> None:
    """Apart from the attacks, so that other thresholds need no other AutoAttack; transfer is one of its checks."""
    others = _folders(args, sources(args, without=trainer), seed)
    launch("trainer=none", f"checkpoint={args.runs}/{trainer}-{seed}", f"seed={seed}", f"eps={args.eps}",
           f"evaluation.samples={args.samples}", "attack=transfer", f"attack.transfer.sources={others}",
           "analysis=masking", f"runs_dir={args.runs}", f"name=audited-{trainer}-{seed}")  # fmt: skip


def matrix(args: argparse.Namespace, seed: int) -> None:
    compared = sources(args)
    launch("trainer=none", f"checkpoint={args.runs}/{compared[0]}-{seed}", f"seed={seed}", f"eps={args.eps}",
           f"evaluation.samples={args.samples}", "attack=none", "analysis=transfer_matrix",
           f"analysis.transfer_matrix.runs={_folders(args, compared, seed)}",
           f"runs_dir={args.runs}", f"name=matrix-{seed}")  # fmt: skip


def figures(args: argparse.Namespace) -> None:
    """Everything that a run shows, for SEEN and every seed, in one multirun; then the trainers side by side."""
    seen = [name for name in SEEN if name in args.trainers]
    common = ("trainer=none", f"eps={args.eps}", f"evaluation.samples={args.samples}")
    runs = ",".join(str(args.runs / f"{trainer}-{seed}") for trainer in seen for seed in args.seeds)
    launch("-m", *common, f"checkpoint={runs}", "attack=suite", f"runs_dir={args.runs}/figures")
    own, *others = sorted(seen, key=lambda name: name != "rl")
    compared = _folders(args, others, args.seeds[0])
    launch(*common, f"checkpoint={args.runs}/{own}-{args.seeds[0]}", "attack=none", "analysis=[landscape,gradients]",
           f"analysis.landscape.runs={compared}", f"analysis.gradients.runs={compared}",
           f"runs_dir={args.runs}/figures", "name=compared")  # fmt: skip


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
        "| trainer | seed | clean | pgd_paper | pgd | AutoAttack | worst transfer | worst case | masking audit "
        "| p_y = 1 | pgd_paper misses |",
        "|---" * 11 + "|",
    ]
    for trainer in args.trainers:
        for seed in args.seeds:
            run = summary(args.runs / f"evaluated-{trainer}-{seed}")
            attacks = run["attacks"]
            transfers = {
                name: attack["robust_accuracy"]
                for name, attack in attacks.items()
                if attack["of"] == "transfer" and not name.endswith("_refined")
            }
            worst = min(transfers, key=lambda name: transfers[name]["value"])
            source = worst.removeprefix("transfer_").rpartition("_seed")[0]
            source = source or sources(args, without=trainer)[0]  # a single source is called "transfer"
            cells = [trainer, str(seed), _share(run["clean_accuracy"])]
            cells += [_share(attacks[name]["robust_accuracy"]) for name in ("pgd_paper", "pgd", "autoattack")]
            cells += [f"{_share(transfers[worst])} from {source}", _share(run["worst_case_accuracy"])]
            cells += _audit(summary(args.runs / f"audited-{trainer}-{seed}")["masking"])
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _audit(masking: dict[str, Any]) -> list[str]:
    """The verdict; how many softmaxes are saturated at the images; what the paper's formula misses."""
    says = {check["name"]: check["says"] for check in masking["checks"]}
    verdict = masking["verdict"]
    if verdict not in ("no sign", "not measured"):
        verdict += f": {masking['mechanism']}"
    counts = [
        re.search(pattern, says[name])
        for name, pattern in (
            ("saturated", r"on (\d+ of \d+)"),
            ("paper_formula", r"misses (\d+ of the \d+)"),
        )
    ]
    return [verdict, *("-" if count is None else count[1].replace("the ", "") for count in counts)]


def means(args: argparse.Namespace) -> list[str]:
    """For each trainer, the means over the seeds: the paper's attack, PGD, AutoAttack and the worst case."""
    names = ("pgd_paper", "pgd", "autoattack")
    lines = ["| trainer | clean | pgd_paper | pgd | AutoAttack | worst case |", "|---|---|---|---|---|---|"]
    for trainer in args.trainers:
        runs = [summary(args.runs / f"evaluated-{trainer}-{seed}") for seed in args.seeds]
        columns = [[run["clean_accuracy"]["value"] for run in runs]]
        columns += [[run["attacks"][name]["robust_accuracy"]["value"] for run in runs] for name in names]
        columns.append([run["worst_case_accuracy"]["value"] for run in runs])
        cells = [f"{100 * np.mean(column):.1f}" for column in columns]
        lines.append(f"| {trainer} | {' | '.join(cells)} |")
    return lines


def transfers(args: argparse.Namespace) -> list[str]:
    """The source x target matrix, the mean over seeds of accuracies in % on all images."""
    cells: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        lines = (args.runs / f"matrix-{seed}" / "tables/transfer_matrix.csv").read_text().splitlines()
        header = lines[0].split(",")
        for line in lines[1:]:
            row = dict(zip(header, line.split(","), strict=True))
            pair = (row["source"].rpartition("_seed")[0], row["target"].rpartition("_seed")[0])
            cells.setdefault(pair, []).append(float(row["accuracy"]))
    compared = sources(args)
    lines = [f"| crafted on \\ evaluated on | {' | '.join(compared)} |", "|---|" + "---|" * len(compared)]
    for source in compared:
        shares = [f"{100 * np.mean(cells[source, target]):.1f}" for target in compared]
        lines.append(f"| {source} | {' | '.join(shares)} |")
    return lines


def write(args: argparse.Namespace) -> None:
    environment = summary(args.runs / f"evaluated-{args.trainers[0]}-{args.seeds[0]}")["environment"]
    trained = f"; trained with {' '.join(args.train)}" if args.train else ""
    title = (
        f"{datetime.date.today().isoformat()}; {environment['device']}, torch {environment['torch']}; "
        f"L2 eps {args.eps}, {args.samples} test images, seeds {', '.join(map(str, args.seeds))}{trained}; "
        "accuracies in %, in brackets the 95 % interval over the images"
    )
    parts: Sequence[list[str]] = ([title], robustness(args), means(args), transfers(args))
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", type=Path, help="a local copy of CIFAR-10; without it torchvision's download")
    parser.add_argument("--paper", action="store_true", help="the 6-layer CNN at the paper's settings: for a GPU")
    parser.add_argument("--eps", type=float, help="L2; 0.5 at 16x16, with --paper 1.0 at 32x32: equal per pixel")
    parser.add_argument(
        "--train", nargs="+", default=[], metavar="KEY=VALUE",
        help="overrides of every training, such as model=cnn model.net.width=0.25",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=500, help="test images that are attacked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown")
    args = parser.parse_args()
    args.eps = args.eps or (1.0 if args.paper else 0.5)
    for seed in args.seeds:
        for trainer in args.trainers:
            if "train" in args.only:
                train(args, trainer, seed)
    for seed in args.seeds:
        if "matrix" in args.only:
            matrix(args, seed)
        for trainer in args.trainers:
            if "evaluate" in args.only:
                evaluate(args, trainer, seed)
            if "audit" in args.only:
                audit(args, trainer, seed)
    if "figures" in args.only:
        figures(args)
    if "write" in args.only:
        write(args)


if __name__ == "__main__":
    main()

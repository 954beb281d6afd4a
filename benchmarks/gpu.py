"""Everything that needs a GPU, in steps that can be interrupted: `python -m benchmarks.gpu FOLDER`.

The most valuable comes first: the tests marked gpu; sl, rl, rl_readme and an sl of equal accuracy with the 6-layer CNN,
one seed, then two more; CIFAR-100, judged with and without normalisation; then speed and memory.

The output of each finished step is in FOLDER; a repeated command resumes with the next step. With `--minutes 10` it
stops by itself. At the end FOLDER holds results.md, results-seeds.md and results-cifar100.md for docs/results.md, and
performance.md for docs/performance.md. `--tiny` does all of it with digits and few steps, to try it without a GPU.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.training import NETS

_ROOT = Path(__file__).resolve().parent.parent
_REQUEUE = 75  # exit code of launch.py when it was stopped and can resume
_SECONDS_TO_SAVE = 60


def steps(args: argparse.Namespace) -> dict[str, list[str]]:
    """Every step's command by its name, in order; none needs more than ten minutes, but for the results,
    which resume by themselves."""
    python, out = sys.executable, ["--out", str(args.folder / "performance.md")]
    data = ["--cifar10", str(args.cifar10)] if args.cifar10 else []
    bench = [python, "-m", "benchmarks", *data, *out, "--rounds", str(args.rounds)]
    fast = ["--precision", "bf16", "--tf32", "--compile"]
    found = {"tests": [python, "-m", "pytest", "-n", "0", "-v", "-m", "gpu"], **results(args)}
    if args.tiny:
        return found
    for net in NETS:
        found[f"training-{net}"] = [*bench, "--only", "training", "--net", net]
        found[f"training-{net}-bf16"] = [*bench, "--only", "training", "--net", net, *fast]
    for part in ("recipes", "attacks", "autoattack", "memory", "scaling", "startup", "analyses"):
        found[part] = [*bench, "--only", part]
    found["autoattack"] += ["--rounds", str(min(args.rounds, 3))]
    if args.imagenet100:
        found["memory"] += ["--imagenet100", str(args.imagenet100)]
    found["profile"] = [python, "-m", "benchmarks.profile", "--batch-size", "256", "--precision", "bf16"]
    return found


def results(args: argparse.Namespace) -> dict[str, list[str]]:
    """The paper's headline: these steps resume by themselves."""
    found = {}
    for name, data, options in (
        ("results", args.cifar10, ["--seeds", "0"]),
        ("results-seeds", args.cifar10, ["--seeds", "0", "1", "2"]),
        ("results-cifar100", args.cifar100, ["--dataset", "cifar100", "--trainers", "sl", "rl_bare"]),
    ):
        runs = args.folder / ("runs-cifar100" if name == "results-cifar100" else "runs")
        command = [sys.executable, "-m", "benchmarks.results", *options, "--runs", str(runs), "--jobs", "4",
                   "--out", str(args.folder / f"{name}.md"), *(["--data", str(data)] if data else [])]  # fmt: skip
        tiny = ["trainer.epochs=2", "dataset.train_samples=200", "model=alicnn", "logger=none"]
        small = ["--dataset", "digits", "--samples", "20", "--train", *tiny, "--judge", "logger=none"]
        found[name] = [*command, *(small if args.tiny else ["--samples", "1000", "--train", "hardware=fast"])]
    return found


def run(name: str, command: list[str], folder: Path, seconds: float | None) -> bool:
    """Whether the step finished; its output then is in `folder`. Cut off, it is given a minute to save."""
    part = folder / f"{name}.part"
    with part.open("w") as file:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=file, process_group=0)
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            _end(process)
            if isinstance(error, KeyboardInterrupt):
                raise
            return False
    if code:
        print(f"{name}: ended with {code}; its output is in {part}", file=sys.stderr)
        return False
    part.rename(folder / f"{name}.txt")
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """The step and all that it has started."""
    for kind in (signal.SIGINT, signal.SIGKILL):  # pytest names what failed when it is interrupted
        try:
            os.killpg(process.pid, kind)
            process.wait(_SECONDS_TO_SAVE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the outputs are kept")
    parser.add_argument("--cifar10", type=Path, help="a local copy; without it torchvision's, and digits to attack")
    parser.add_argument("--cifar100", type=Path, help="a local copy")
    parser.add_argument("--imagenet100", type=Path, help="a local copy of ImageNet-100, for memory at 224x224")
    parser.add_argument("--minutes", type=float, help="stop after so many, and say what is left")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="digits and few steps, and no benchmarks")
    parser.add_argument("--dry-run", action="store_true", help="print what is left, and do none of it")
    args = parser.parse_args()
    for key in ("folder", "cifar10", "cifar100", "imagenet100"):
        if getattr(args, key):
            setattr(args, key, getattr(args, key).resolve())
    until = time.monotonic() + 60 * args.minutes if args.minutes else None
    args.folder.mkdir(parents=True, exist_ok=True)
    todo = {name: command for name, command in steps(args).items() if not (args.folder / f"{name}.txt").exists()}
    left = list(todo)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name, command in todo.items():
            seconds = None if until is None else until - time.monotonic() - _SECONDS_TO_SAVE
            if seconds is not None and seconds <= 0:
                break
            print("+", shlex.join(command), file=sys.stderr, flush=True)
            if not args.dry_run and run(name, command, args.folder, seconds):
                left.remove(name)
    except KeyboardInterrupt:
        print("cut off", file=sys.stderr)
    print(f"left: {', '.join(left) or 'nothing'}")
    if left and not args.dry_run:
        print("the same command resumes")
        sys.exit(_REQUEUE)


if __name__ == "__main__":
    main()

"""Whether a change of the code changes numbers: twelve small runs on digits, recorded before it and after it.

    python -m benchmarks.golden before.json      # run them all, about five minutes on two cores
    python -m benchmarks.golden after.json --against before.json

What is recorded of a run: a hash of each tensor of its weights, of each array of outcomes.npz, and every number of
results.jsonl but times. Equal on the same machine and torch; bits differ between machines.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
_QUICK = ("logger=none", "trainer.epochs=3", "eps=0.4", "evaluation.samples=60", "analysis=none")
_ATTACKS = ("attack=[fgsm,pgd]", "attack.pgd.steps=10")
_FROM = ("trainer=none", "logger=none", "eps=0.4", "evaluation.samples=60")
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
_TRAINERS = ("sl", "rl", "rl_adv", "sl_adv", "rl_expected", "pgd_at", "trades")
RUNS: dict[str, tuple[str, ...]] = {
    **{name: (f"trainer={name}", *_QUICK, *_ATTACKS) for name in _TRAINERS},
    "rl_adv": ("trainer=rl_adv", "trainer.adversary.start_epoch=1", *_QUICK, *_ATTACKS),
    "sl_adv": ("trainer=sl_adv", "trainer.adversary.start_epoch=1", *_QUICK, *_ATTACKS),
    "suite": (*_FROM, "checkpoint={runs}/rl", "attack=suite", "evaluation.samples=30", "analysis=none"),
    "transfer": (
        *_FROM, "checkpoint={runs}/rl", "attack=transfer", "attack.transfer.sources=[{runs}/sl]", "analysis=none",
    ),
    "masking": (
        *_FROM, "checkpoint={runs}/rl", "attack=pgd", "attack.pgd.steps=10", "analysis=[masking,curve,norms,gradients]",
        "analysis.masking.samples=24", "analysis.masking.steps=10", "analysis.curve.steps=5",
    ),
    "ddp": ("trainer=rl_adv", "trainer.adversary.start_epoch=1", "hardware=ddp", "hardware.device=cpu", *_QUICK,
            *_ATTACKS),
    "resumed": ("trainer=rl", *_QUICK, *_ATTACKS, "trainer.epochs=12"),
    "foreign": (
        "model=foreign", "model.net._target_=torchvision.models.squeezenet1_1", "model.mean=[0.5]", "model.std=[0.25]",
        "dataset.size=32", "dataset.channels=3", "trainer=sl", *_QUICK, *_ATTACKS, "trainer.epochs=1",
    ),
}  # fmt: skip


def _start(name: str, runs: Path) -> "subprocess.Popen[bytes]":
    words = [word.format(runs=runs) for word in RUNS[name]]
    launcher = _TORCHRUN if "hardware=ddp" in words else ()
    command = [sys.executable, *launcher, str(_LAUNCH), *words, f"runs_dir={runs}", f"name={name}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _run(name: str, runs: Path) -> None:
    process = _start(name, runs)
    if name == "resumed":  # asked to end in its midst, and started again
        while process.poll() is None and b'"step":3' not in _bytes(runs / name / "results.jsonl"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait()
        process = _start(name, runs)
    if code := process.wait():
        raise SystemExit(f"{name}: ended with {code}")


def _bytes(path: Path) -> bytes:
    return path.read_bytes().replace(b" ", b"") if path.exists() else b""


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def recorded(folder: Path) -> dict[str, Any]:
    """Everything of a run that a change of the code should not change."""
    found: dict[str, Any] = {}
    for name in ("best", "last"):
        if (path := folder / f"checkpoints/{name}.pt").exists():
            state = torch.load(path, weights_only=True)["model"]
            found |= {f"{name}.pt {key}": _digest(tensor.numpy()) for key, tensor in state.items()}
    with np.load(folder / "outcomes.npz") as file:
        found |= {f"outcomes.npz {key}": _digest(file[key]) for key in file.files}
    for line in (folder / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        if "seconds" not in result["metric"] and "per_second" not in result["metric"]:
            key = " ".join(str(result[part]) for part in ("split", "attack", "source", "metric", "eps", "step", "n"))
            found[f"results.jsonl {key}"] = result["value"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to record")
    parser.add_argument("--against", type=Path, help="an earlier record to compare with")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            _run(name, Path(scratch))
            found[name] = recorded(Path(scratch) / name)
            args.file.write_text(json.dumps(found, indent=1).replace(scratch, "") + "\n")
            print(f"{name}: {len(found[name])} values", flush=True)
    if args.against is None:
        return
    before, after = json.loads(args.against.read_text()), json.loads(args.file.read_text())
    different = 0
    for name in args.only:
        keys = [key for key in before[name] | after[name] if before[name].get(key) != after[name].get(key)]
        different += len(keys)
        print(f"{name}: {'equal' if not keys else f'{len(keys)} of {len(before[name])} differ'}")
        for key in keys[:5]:
            print(f"  {key}: {before[name].get(key)} -> {after[name].get(key)}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

"""Small networks whose robust accuracy is known, judged by aerl: `python -m benchmarks.truth FOLDER [--held-out]`.

Each kind is made with seed 0, on which thresholds may be chosen, and with seed 1, which is set aside: --held-out judges
these. The truth is the worst case over everything: the run's attacks, PGD with restarts, FMN, Square with many queries,
and, for a network that changes another one, examples crafted on that one. It is an upper bound, like every such number;
of a randomised network it is the expectation.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks import AutoAttack, SampleGenerator, attacking, fmn, losses, pgd
from aerl.evaluation.statistics import wilson

ROOT = Path(__file__).parent.parent
EPS, SAMPLES = 0.5, 100
MISLED = 0.1  # plain PGD is misled if it overstates the accuracy by more


# --- Networks --------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """`after(inner(before(x)))`."""

    def __init__(self, inner: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.after(self.inner(self.before(x)))
        return logits


class Winners(nn.Module):
    """k-winners-take-all (Xiao et al. 2020): only the largest tenth of the activations pass."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class Detached(nn.Module):
    """The network has no gradient; that of a sine too small to decide anything is there instead."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x).detach() + 1e-4 * (9 * x.flatten(1)[:, :10]).sin()
        return logits


class Decoy(nn.Module):
    """A steep ripple on the logits, smaller than their differences, hides the network's slope."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + 0.3 * (200 * x.flatten(1)[:, 20:30]).sin()


class ZeroGradient(torch.autograd.Function):
    """A step function that states a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (15 * x).round() / 15

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient)


def _jpeg(x: Tensor) -> Tensor:
    from PIL import Image

    images = []
    for image in (x * 255).byte()[:, 0]:
        file = io.BytesIO()
        Image.fromarray(image.cpu().numpy()).save(file, "jpeg", quality=75)
        images.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(images)[:, None].to(x) / 255


def _numpy(x: Tensor) -> Tensor:
    return torch.tensor(np.round(x.detach().cpu().numpy().reshape(len(x), -1) * 15) / 15).view_as(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scaled": lambda net: Wrapped(net, after=lambda z: 1000 * z),
    "probabilities": lambda net: Wrapped(net, after=lambda z: (30 * z).softmax(1)),
    "quantised": lambda net: Wrapped(net, before=lambda x: (7 * x).round() / 7),
    "bits": lambda net: Wrapped(net, before=lambda x: ((x * 255).byte() >> 5 << 5).float() / 255),
    "jpeg": lambda net: Wrapped(net, before=_jpeg),
    "numpy": lambda net: Wrapped(net, before=_numpy),
    "function": lambda net: Wrapped(net, before=ZeroGradient.apply),
    "detached": Detached,
    "decoy": Decoy,
    "noisy": lambda net: Wrapped(net, before=lambda x: x + 0.2 * torch.randn_like(x)),
    "dropout": lambda net: Wrapped(net, before=lambda x: F.dropout(x, 0.2, training=True)),
}
HONEST = ("plain", "wide", "mlp", "tanh", "smoothed", "augmented", "pgd_at", "trades")
TRAINED = ("distilled", "smoothed_strongly", "winners", "fgsm", "rl")
KINDS = (*HONEST, *TRAINED, *WRAPPERS)


def _architecture(kind: str) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    width, activation = 36 if kind == "wide" else 12, {"tanh": nn.Tanh, "winners": Winners}.get(kind, nn.ReLU)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), activation(), nn.Flatten(),
        nn.Linear(32 * width, 48), activation(), nn.Linear(48, 10),
    )  # fmt: skip


def net(*, kind: str, file: str, num_classes: int) -> nn.Module:
    """The network of a kind, with the weights in a file, for `model.net._target_`."""
    inner = _architecture(kind)
    inner.load_state_dict(torch.load(file, weights_only=True))
    return WRAPPERS[kind](inner) if kind in WRAPPERS else inner


# --- Training --------------------------------------------------------------------------------------------


def train(kind: str, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """A network of a kind trained on images x (N, 1, 8, 8) of classes y (N,)."""
    torch.manual_seed(seed)
    model = _architecture(kind)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2 if kind == "rl" else 3e-3)
    epochs = {"rl": 300, "pgd_at": 15, "trades": 15, "fgsm": 30, "winners": 12}.get(kind, 8)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            _loss(kind, model, x[rows], y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def _loss(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    noise = SampleGenerator.for_images(x, int(torch.randint(1 << 30, ())))
    attack: dict[str, Any] = {"generator": noise, "norm": "L2", "drop_fooled": False, "keep": "last"}
    if kind == "augmented":
        x = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    if kind == "pgd_at":
        x = pgd(model, x, y, eps=EPS, steps=5, step_size=EPS / 3, loss="ce", **attack)
    if kind == "fgsm":  # in Linf, one step as long as the ball: catastrophic overfitting (Wong et al. 2020)
        x = pgd(
            model, x, y, eps=0.25, steps=1, step_size=0.25, random_start=False, loss="ce", **attack | {"norm": "Linf"}
        )
    logits = model(x)
    if kind == "trades":
        near = pgd(model, x, y, eps=EPS, steps=5, step_size=EPS / 3, loss="kl", **attack)
        return F.cross_entropy(logits, y) + 4 * losses.kl(model(near), logits).mean()
    if kind == "rl":  # policy gradient with exploration, until the softmax is saturated
        drawn, explore = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1), torch.rand(len(y)) < 0.1
        action = torch.where(explore, torch.randint(10, y.shape), drawn)
        reward = (action == y).float()
        return -(reward * logits.log_softmax(1).gather(1, action[:, None]).squeeze(1)).mean()
    if kind == "distilled":  # a temperature in training alone (Papernot et al. 2016, without the teacher)
        return F.cross_entropy(logits / 40, y)
    smoothing = {"smoothed": 0.1, "smoothed_strongly": 0.8}.get(kind, 0.0)
    return F.cross_entropy(logits, y, label_smoothing=smoothing)


# --- The truth -------------------------------------------------------------------------------------------


def truth(kind: str, file: Path, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy of images x of classes y in the worst case over the attacks of this script, and under plain PGD."""
    model = net(kind=kind, file=str(file), num_classes=10).eval()
    inner = net(kind="plain", file=str(file), num_classes=10).eval() if kind in WRAPPERS else model
    noise = SampleGenerator.for_images(x, 1)
    shared: dict[str, Any] = {"generator": noise, "norm": "L2", "eps": EPS}
    found = [pgd(inner, x, y, restarts=10, loss=loss, steps=100, **shared) for loss in ("log_odds", "dlr")]
    found += [pgd(inner, x, y, drop_fooled=False, loss="margin", steps=200, **shared)]  # far beyond the boundary
    found += [fmn(inner, x, y, steps=200, **shared)]
    if kind in ("noisy", "dropout"):
        found += [pgd(model, x, y, eot=32, drop_fooled=False, keep="last", **shared)]
    else:
        found += [AutoAttack(norm="L2", eps=EPS, attacks=["square"], queries=5000)(model, x, y, generator=noise)]
    try:
        plain = pgd(model, x, y, loss="ce", steps=40, **shared)
    except Exception:  # no gradient at all
        plain = x
    shares = torch.stack([_share_right(model, each, y, kind) for each in (x, *found, plain)])
    return shares.amin(0).mean().item(), shares[[0, -1]].amin(0).mean().item()


def _share_right(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Tensor:
    """(B,), over 100 passes of a randomised network."""
    with attacking(model), torch.no_grad():
        passes = [model(x).argmax(1) == y for _ in range(100 if kind in ("noisy", "dropout") else 1)]
    return torch.stack(passes).float().mean(0)


# --- Judging ---------------------------------------------------------------------------------------------


def run(kind: str, seed: int, folder: Path, name: str, *words: str) -> dict[str, Any]:
    """Evaluate one network by the real command line; returns the summary of the run."""
    words = (
        "trainer=none", "checkpoint=own", "dataset=digits", "model=foreign", "model.net._target_=benchmarks.truth.net",
        f"+model.net.kind={kind}", f"+model.net.file={folder}/{_trained(kind)}-{seed}.pt", f"model.name={kind}",
        "model.mean=[0]", "model.std=[1]", "norm=L2", f"eps={EPS}", f"evaluation.samples={SAMPLES}", "logger=none",
        "hardware=cpu", "hardware.threads=1", f"runs_dir={folder}/runs", f"name={name}", f"seed={seed}", *words,
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr.splitlines()[-1]}")
    summary: dict[str, Any] = json.loads((folder / "runs" / name / "summary.json").read_text())
    return summary


def planted(kind: str, seed: int, folder: Path) -> tuple[str, str]:
    """The kind, and what the planted test says of plain PGD on its network."""
    summary = run(kind, seed, folder, f"{kind}-{seed}-plain", "attack=pgd_ce", "analysis=planted")
    found = summary.get("planted")
    return kind, found["says"] if found else f"not measured: {summary['not_made']['planted']}"


def judge(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """What aerl says of one network beside the truth."""
    name = f"{kind}-{seed}"
    summary = run(
        kind, seed, folder, name, "attack=[pgd,pgd_targeted,autoattack,adaptive]", "attack.autoattack.queries=1000",
        "evaluation.survivors_only=true", "analysis=[masking,planted]",
    )  # fmt: skip
    outcomes = dict(np.load(folder / "runs" / name / "outcomes.npz"))
    attacks, worst = summary["attacks"], summary["worst_case_accuracy"]["value"]
    x, y = _test_images(outcomes["index"])
    strongest, plain = truth(kind, folder / f"{_trained(kind)}-{seed}.pt", x, y)
    masking, found = summary["masking"], summary.get("planted")
    return {
        "kind": kind, "honest": kind in HONEST, "seed": seed, "clean": summary["clean_accuracy"]["value"],
        "truth": min(strongest, worst), "plain": plain, "without": attacks["autoattack"]["robust_accuracy"]["value"],
        "with": worst, "remedies": [name.removeprefix("adaptive_") for name in attacks if name.startswith("adaptive_")],
        "verdict": masking["verdict"], "mechanism": masking["mechanism"].partition(":")[0],
        "flagged": [check["name"] for check in masking["checks"] if check["flag"]],
        "planted": found and found["found"]["value"], "not_planted": (summary["not_made"] or {}).get("planted"),
        "seconds": summary["seconds"]["total"],
    }  # fmt: skip


def _trained(kind: str) -> str:
    """The name of the weights: wrapped networks have those of the plain one."""
    return "plain" if kind in WRAPPERS else kind


def _data() -> tuple[Any, Any]:
    from aerl.data import prepare
    from aerl.data.sources import digits

    place = Path(os.environ.get("AERL_DATA", "~/.cache/aerl")).expanduser()
    settings: dict[str, Any] = {"size": None, "channels": None, "val_fraction": 0.1, "split_seed": 42}
    identity = {"_target_": "aerl.data.sources.digits", "path": None}
    data = prepare(digits, identity=identity, data_dir=place, name="digits", **settings)
    return data.train, data.test


def _test_images(index: np.ndarray) -> tuple[Tensor, Tensor]:
    _, test = _data()
    return test.images[index].float() / 255, test.labels[index]


# --- The tables ------------------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line for each network; verdict by verdict; the error of the final number."""
    lines = ["| network | clean | truth | plain PGD | without adaptation | with | remedies | verdict | planted found |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        numbers = [f"{100 * row[key]:.0f}" for key in ("clean", "truth", "plain", "without", "with")]
        planted = "-" if row["planted"] is None else f"{100 * row['planted']:.0f}"
        verdict = row["verdict"] + (
            f": {row['mechanism']}" if row["verdict"] not in ("no sign", "not measured") else ""
        )
        lines.append(f"| {' | '.join([row['kind'], *numbers, ', '.join(row['remedies']) or '-', verdict, planted])} |")
    misled = [row for row in rows if row["plain"] - row["truth"] > MISLED]
    fine = [row for row in rows if row["plain"] - row["truth"] <= MISLED]
    lines += ["", "| verdict | where plain PGD is misled | where it is not |", "|---|---|---|"]
    for name in ("masked", "suspicious", "no sign", "not measured"):
        counts = [_share(sum(row["verdict"].startswith(name) for row in group), len(group)) for group in (misled, fine)]
        lines.append(f"| {name} | {counts[0]} | {counts[1]} |")
    found = [row for row in rows if row["planted"] is not None]
    low = [sum(row["planted"] < 0.95 for row in found if row in group) for group in (misled, fine)]
    lines.append(f"| planted test under 95 % | {low[0]} | {low[1]} |")
    lines += ["", "| number | mean error | largest error |", "|---|---|---|"]
    for key, title in (("plain", "plain PGD"), ("without", "suite without adaptation"), ("with", "suite")):
        errors = [abs(row[key] - row["truth"]) for row in rows]
        lines.append(f"| {title} | {100 * np.mean(errors):.1f} | {100 * max(errors):.1f} |")
    return "\n".join(lines)


def _share(count: int, n: int) -> str:
    if n == 0:
        return "-"
    low, high = wilson(count, n)
    return f"{count} of {n} ({100 * low:.0f} to {100 * high:.0f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.truth", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--held-out", action="store_true", help="judge the networks that were set aside (seed 1)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--planted", action="store_true", help="only the planted test of plain PGD (cross-entropy)")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seed, folder = int(given.held_out), given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = _data()
    x, y = images.images.float() / 255, images.labels
    for kind in dict.fromkeys(_trained(kind) for kind in given.kinds):
        file = folder / f"{kind}-{seed}.pt"
        if not file.is_file():
            torch.save(train(kind, seed, x, y).state_dict(), file)
    with ThreadPoolExecutor(given.jobs) as pool:
        if given.planted:
            for kind, text in pool.map(lambda kind: planted(kind, seed, folder), given.kinds):
                print(f"| {kind} | {text} |", flush=True)
            return
        rows = []
        for row in pool.map(lambda kind: judge(kind, seed, folder), given.kinds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    (folder / f"truth-{seed}.json").write_text(json.dumps({"date": str(date.today()), "rows": rows}, indent=1))
    print(tables(rows))


if __name__ == "__main__":
    main()

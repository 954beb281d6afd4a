"""Peak memory of training, of attacks and of datasets, each in a process of its own.

On the CPU it is the peak of resident memory above what the process has after its imports; on a GPU,
torch.cuda.max_memory_allocated. Memory that must not grow with the number of samples is measured at several.
"""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from aerl.attacks import AutoAttack, pgd
from aerl.data import Batches, Split, prepare
from aerl.data.sources import cifar, huggingface
from aerl.evaluation import evaluate
from aerl.runtime.device import Hardware, set_up
from aerl.tracking.results import ResultLog
from aerl.training.loop import fit
from benchmarks.paired import in_its_own_process
from benchmarks.training import Work, classifier, random_data, random_split, recipe

ATTACKS: dict[str, Callable[..., object]] = {
    "pgd": partial(pgd, norm="L2", eps=1.0, steps=5, drop_fooled=False),
    **{
        name: AutoAttack(norm="L2", eps=1.0, attacks=[name], queries=200, batch_size=64)
        for name in ("apgd-ce", "apgd-t", "fab-t", "square")
    },
}


# --- What a process does whose memory is looked at ---------------------------------------------------------


def train(device: str, work: Work, samples: int) -> float:
    """MB that one epoch needs."""
    hardware = _hardware(device)
    with _peak(hardware) as peak, TemporaryDirectory() as folder:
        model, data = classifier(work, hardware), random_data(samples, work.size)
        log = ResultLog(Path(folder), {"run_id": "", "seed": 0, "dataset": "", "model": "", "trainer": ""})
        with contextlib.redirect_stderr(io.StringIO()):
            fit(model, data, recipe(work), hardware, seed=0, folder=Path(folder), results=log)
    return peak[0]


def attack(device: str, name: str, work: Work, samples: int) -> float:
    """MB that an attack needs on an untrained net, whose own classes are the labels."""
    hardware = _hardware(device)
    with _peak(hardware) as peak:
        model, split = classifier(work, hardware), random_split(samples, work.size)
        clean = evaluate.predict(model, split, hardware, work.batch_size)
        split = Split(split.images, torch.from_numpy(clean.pred))
        evaluate.run_attack(ATTACKS[name], model, split, clean, hardware, name=name, seed=0, batch_size=work.batch_size)
    return peak[0]


def cifar10(path: str, data_dir: str) -> float:
    """MB that CIFAR-10 needs: the first time it is prepared, the second time read from the cache."""
    with _peak(Hardware(torch.device("cpu"))) as peak:
        data = prepare(
            lambda: cifar(variant="cifar10", path=path, data_dir=data_dir),
            identity={"path": path, "variant": "cifar10"}, data_dir=data_dir, name="cifar10", size=None,
            channels=None, val_fraction=0.1, split_seed=42,
        )  # fmt: skip
        data.train.images[::997].float().mean()
    return peak[0]


def imagenet100(path: str, data_dir: str) -> dict[str, float]:
    """GB on disk at 224x224, and MB of memory of the process's own while it prepares and reads one epoch.

    Pages of the mapped file are left out, since the system takes them back whenever it needs memory.
    """
    with _peak(Hardware(torch.device("cpu")), "RssAnon") as peak:
        data = prepare(
            lambda: huggingface(path=path), identity={"path": path}, data_dir=data_dir, name="imagenet100",
            size=224, channels=3, val_fraction=0.1, split_seed=42,
        )  # fmt: skip
        for _ in Batches(data.train, 32, drop_last=True).epoch(torch.Generator().manual_seed(0)):
            pass
    size = sum(split.images.nbytes for split in (data.train, data.val, data.test))
    return {"megabytes": peak[0], "gigabytes": size / 1e9, "mapped": data.train.mapped}


def _hardware(device: str) -> Hardware:
    return set_up(device=device, precision="fp32", tf32=False, channels_last=True, compile=False, threads=None,
                  deterministic=False)  # fmt: skip


@contextmanager
def _peak(hardware: Hardware, kind: str = "VmRSS") -> Iterator[list[float]]:
    """A list that is given the peak in MB on leaving.

    Looked at every few milliseconds, since ru_maxrss and VmHWM also hold what the imports took for a moment.
    """
    status, highest, over = Path("/proc/self/status"), 0, threading.Event()

    def resident() -> int:
        return int(status.read_text().split(f"{kind}:")[1].split()[0])

    def watch() -> None:
        nonlocal highest
        while not over.is_set():
            highest = max(highest, resident())
            time.sleep(0.005)

    before, found = resident(), [0.0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found[0] = (highest - before) / 1024
        if hardware.device.type == "cuda":
            found[0] = torch.cuda.max_memory_allocated() / 2**20


# --- Rows -------------------------------------------------------------------------------------------------


def _alone(job: Callable[..., object], *args: object) -> object:
    with in_its_own_process(partial, job, *args) as call:
        return call()


def _megabytes(values: list[object]) -> str:
    return f"{' / '.join(f'{value:.0f}' for value in values)} MB"


def measure(
    hardware: Hardware, scratch: Path, cifar10_path: Path | None, imagenet100_path: Path | None, smoke: bool
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal)."""
    device = hardware.device.type
    counts = (8,) if smoke else (2_000, 4_000, 8_000)
    work = Work("alicnn", "sl", 8 if smoke else 64, 32)
    peaks = [_alone(train, device, work, count) for count in counts]
    many = " / ".join(f"{count:,}" for count in counts)
    rows = [(f"{work}, {many} images of 3 KB: peak memory", _megabytes(peaks), "flat but for the images")]
    for name in ["pgd"] if smoke else ATTACKS:
        work = Work("cnn", "sl", 8 if smoke else 64, 32, 0.1)
        # The targeted ones take nine times as long.
        counts = (8,) if smoke else (64, 256) if name in ("apgd-t", "fab-t") else (64, 256, 1024)
        peaks = [_alone(attack, device, name, work, count) for count in counts]
        many = " / ".join(map(str, counts))
        rows.append((f"{name}, {work.shape}, {many} images: peak memory", _megabytes(peaks), "flat"))
    if not smoke:
        sides = (64, 128, 224)
        works = [Work("resnet18", "sl", 16, side) for side in sides]
        shapes = f"{works[0]}".replace("64x64", " / ".join(map(str, sides)) + " pixels a side")
        peaks = [_alone(train, device, work, 64) for work in works]
        rows.append((f"{shapes}: peak memory of training", _megabytes(peaks), "as the pixels"))
        peaks = [_alone(attack, device, "pgd", work, 16) for work in works]
        rows.append((f"{shapes}: peak memory of pgd", _megabytes(peaks), "as the pixels"))
    if cifar10_path is not None:
        cache = str(scratch / "memory")
        for start in ("first", "second"):
            peak = _alone(cifar10, str(cifar10_path), cache)
            rows.append((f"CIFAR-10 in memory, {start} start: peak memory", f"{peak:.0f} MB", "<= 700 MB"))
    if imagenet100_path is not None:
        for start in ("first", "second"):
            found = _alone(imagenet100, str(imagenet100_path), str(scratch / "memory"))
            where = "mapped" if found["mapped"] else "in memory"
            what = f"ImageNet-100 at 224x224, {found['gigabytes']:.1f} GB {where}, {start} start and one epoch read"
            rows.append((f"{what}: peak of own memory", f"{found['megabytes']:.0f} MB", "<= 1,000 MB"))
    return rows

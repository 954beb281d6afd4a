"""Training: aerl's `fit` against the loop of the paper's code, and against a bare step on a resident batch.

Also how many floating-point operations a step takes, and which share of the device's fastest matrix product
that is. All candidates take turns.
"""

import io
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from aerl.attacks import evaluating, frozen, pgd
from aerl.data import DataSplits, Split, augment
from aerl.models import CNN, AliCNN, Classifier, torchvision_net
from aerl.runtime.device import Hardware
from aerl.tracking.results import ResultLog
from aerl.training.loop import Adversary, Recipe, fit
from aerl.training.objectives import EpsilonGreedy, Labels, policy_gradient
from benchmarks.paired import Timed, in_its_own_process, ratio, synchronize, time_in_turns, timed

TRAINERS = ("sl", "rl", "rl_adv")
NETS = ("cnn", "alicnn", "resnet18")
FGSM_EPS = 0.01
_IMAGES = 1 << 30  # bytes of images that one measurement trains on, at the most
_WARM = 2  # steps that `fit` is not timed on: the optimizer's state, the convolutions' tuning, the compiler


@dataclass(frozen=True)
class Work:
    """One training to be measured: `net` of NETS on square images of `size` pixels, `batch_size` at a time."""

    net: str
    trainer: str
    batch_size: int
    size: int
    width: float = 1.0

    @property
    def shape(self) -> str:
        name = {"cnn": "6-layer CNN", "alicnn": "AliCNN", "resnet18": "ResNet-18"}[self.net]
        narrow = "" if self.width == 1 else f" x{self.width}"
        return f"{name}{narrow}, {self.size}x{self.size}, batch {self.batch_size}"

    def __str__(self) -> str:
        return f"{self.trainer}, {self.shape}"


def works(net: str, hardware: Hardware, smoke: bool) -> list[Work]:
    """The paper's batch sizes: 256 for supervised learning, 32 for policy gradients."""
    size = 224 if net == "resnet18" and not smoke else 32
    sizes = {"sl": 256, "rl": 32, "rl_adv": 32}
    if smoke:
        sizes = dict.fromkeys(TRAINERS, 2)
    elif net == "resnet18" and hardware.device.type == "cpu":
        sizes = dict.fromkeys(TRAINERS, 16)  # 256 such images take a CPU minutes a step
    return [Work(net, trainer, sizes[trainer], size, 0.1 if smoke and net == "cnn" else 1.0) for trainer in TRAINERS]


def network(work: Work, *, padded_by_pytorch: bool = False) -> nn.Module:
    shape: dict[str, Any] = {"num_classes": 10, "channels": 3, "size": (work.size, work.size)}
    if work.net == "alicnn":
        return AliCNN(**shape)
    if work.net == "resnet18":
        return torchvision_net(**shape, arch="resnet18", resize=None)
    return (PaddedByPyTorch if padded_by_pytorch else CNN)(**shape, width=work.width)


def classifier(work: Work, hardware: Hardware) -> Classifier:
    torch.manual_seed(0)
    return hardware.place(Classifier(network(work), (0.5,) * 3, (0.25,) * 3))


def random_split(count: int, size: int) -> Split:
    """Real pixels would not change the time of a step; random ones need no file."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def random_data(count: int, size: int) -> DataSplits:
    few = random_split(8, size)
    names = tuple(map(str, range(10)))
    return DataSplits(random_split(count, size), few, few, names, (0.5,) * 3, (0.25,) * 3)


# --- The paper's loop -------------------------------------------------------------------------------------


class PerImage(Dataset[tuple[Tensor, int]]):
    """The paper's data pipeline: every image is a PIL image, augmented and normalised one at a time.

    An epoch is as long as CIFAR-10's, so that the workers' restart weighs what it does there.
    """

    def __init__(self, split: Split) -> None:
        self.images = split.images.permute(0, 2, 3, 1).numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.RandomAffine(0, translate=(0.1, 0.1)),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return 45_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = index % len(self.labels)
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


class PaddedByPyTorch(CNN):
    """The 6-layer CNN with padding="same", the usual way to write its even kernels."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        for i in range(1, 7):
            conv = getattr(self, f"conv{i}")
            setattr(self, f"conv{i}", nn.Conv2d(conv.in_channels, conv.out_channels, 4, padding="same"))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 7):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            if i % 2 == 0:
                x = self.dropouts[i // 2 - 1](self.pool(x))
        x = F.relu(self.bn7(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(self.dropouts[3](x))
        return logits


def forever(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def papers_loop(work: Work, device: torch.device) -> Callable[[], None]:
    """One step per call: DataLoader with 2 workers, contiguous layout, PyTorch's own precision, AdamW.

    Its passes: a policy gradient draws its actions in one forward pass and scores them in another. With an adversary
    it draws four times; we assume four forward passes, two of them without a graph, and the forward pass and the input
    gradient of one FGSM step. A loop that also computed the parameters' gradients at that step would be slower.
    """
    torch.manual_seed(0)
    net = network(work, padded_by_pytorch=True).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4 if work.trainer == "sl" else 1e-3)
    loader = DataLoader(
        PerImage(random_split(1024 if work.size == 32 else 128, work.size)),
        work.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True,
        multiprocessing_context="fork",  # Linux's default, which a process that was spawned itself has lost
    )  # fmt: skip
    batches = forever(loader)

    def score(x: Tensor, y: Tensor) -> Tensor:
        if work.trainer == "sl":
            return F.cross_entropy(net(x), y)
        with torch.no_grad():
            policy = net(x).softmax(1)
        explore = torch.rand(()) < 0.1  # one coin for the batch
        actions = torch.randint_like(y, 10) if explore else torch.multinomial(policy, 1).squeeze(1)
        log_policy = net(x).log_softmax(1).gather(1, actions[:, None]).squeeze(1)
        return -((actions == y).float() * log_policy).mean()

    def step() -> None:
        x, y = (t.to(device) for t in next(batches))
        optimizer.zero_grad()
        loss = score(x, y)
        if work.trainer == "rl_adv":
            probe = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(probe), y), probe)
            loss = loss + score(x + FGSM_EPS * gradient.sign(), y)
        loss.backward()
        if work.trainer == "sl":
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        loss.item()  # it is shown after every step

    return step


def papers_loops(device: torch.device) -> Callable[[Work, int], Timed]:
    """All of them in one process; what is called is `(work, steps)`."""
    loop = cache(partial(papers_loop, device=device))
    return lambda work, steps: timed(loop(work), steps)


# --- aerl's, and the ceiling ------------------------------------------------------------------------------


class _Enough(Exception):
    pass


def recipe(work: Work) -> Recipe:
    """As the YAML files of conf/trainer say."""
    fgsm = partial(
        pgd, norm="Linf", eps=FGSM_EPS, steps=1, step_size=FGSM_EPS, random_start=False, drop_fooled=False,
        keep="last", in_training=True,
    )  # fmt: skip
    supervised = work.trainer == "sl"
    return Recipe(
        epochs=1,
        batch_size=work.batch_size,
        optimizer=partial(torch.optim.AdamW, lr=2e-4 if supervised else 1e-3),
        objective=partial(
            policy_gradient, act=Labels() if supervised else EpsilonGreedy(0.1), weight=1.0, probability_floor=0.0
        ),
        clip=1.0 if supervised else None,
        adversary=Adversary(fgsm) if work.trainer == "rl_adv" else None,
        augment=partial(augment, hflip=0.5, vflip=0.5, translate=0.1),
    )


def aerls_loop(work: Work, hardware: Hardware, folder: Path, steps: int) -> Callable[[], Timed]:
    """`fit` on `work`."""
    return timed_fit(classifier(work, hardware), recipe(work), hardware, folder, steps, work.size)


def timed_fit(
    model: nn.Module, recipe: Recipe, hardware: Hardware, folder: Path, steps: int, size: int
) -> Callable[[], Timed]:  # fmt: skip
    """`aerl.training.loop.fit` itself; seconds per step, of `steps` after the first few.

    Every step begins with the augmentation, which is given to `fit` and here looks at the clock. When it has
    seen enough it ends the training, before there is a validation or a checkpoint.
    """
    data = random_data((_WARM + steps + 1) * recipe.batch_size, size)
    folder.mkdir(parents=True)
    log = ResultLog(folder, {"run_id": "", "seed": 0, "dataset": "", "model": "", "trainer": ""})

    def run() -> Timed:
        count, began = 0, 0.0

        def watched(*args: Any, **words: Any) -> Tensor:
            nonlocal count, began
            if count in (_WARM, _WARM + steps):
                synchronize()
                if count == _WARM + steps:
                    began = time.perf_counter() - began
                    raise _Enough
                began = time.perf_counter()
            count += 1
            return recipe.augment(*args, **words)

        model.train()
        with suppress(_Enough), redirect_stderr(io.StringIO()):
            fit(model, data, replace(recipe, augment=watched), hardware, seed=0, folder=folder, results=log)
        return Timed(began / steps)

    return run


def bare_step(work: Work, hardware: Hardware) -> Callable[[], None]:
    """The ceiling: the passes that the method cannot do without, on one float batch, and AdamW.

    No data, no augmentation, no draws, no clipping; every pass in the precision of training, also the
    adversary's, which aerl keeps in float32.
    """
    model = classifier(work, hardware)
    forward: nn.Module = torch.compile(model) if hardware.compile else model  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    x = torch.rand(work.batch_size, 3, work.size, work.size)
    x = x.to(hardware.device, memory_format=hardware.memory_format)
    y = torch.randint(0, 10, (work.batch_size,)).to(hardware.device)

    def step() -> None:
        with hardware.autocast():
            points = [x]
            if work.trainer == "rl_adv":
                with evaluating(model), frozen(model):
                    probe = x.detach().requires_grad_()
                    # A view, because torch's counter of operations takes no leaf for a module's input.
                    value = F.cross_entropy(model(probe.view_as(probe)), y, reduction="sum")
                    (gradient,) = torch.autograd.grad(value, probe)
                points.append((x + FGSM_EPS * gradient.sign()).clamp_(0, 1))
            loss = sum(F.cross_entropy(forward(point), y) for point in points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ceiling(work: Work, hardware: Hardware) -> tuple[Callable[[], None], float]:
    """The bare step in the layout that is faster here, and the seconds that it takes."""
    layouts = {"channels_last": True, "contiguous": False}
    steps = {name: bare_step(work, replace(hardware, channels_last=last)) for name, last in layouts.items()}
    for step in steps.values():
        timed(step, _WARM)
    fastest = {name: min(seconds) for name, seconds in time_in_turns(steps, 3, warm_up=False).items()}
    layout = min(fastest, key=lambda name: fastest[name])
    return steps[layout], fastest[layout]


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call; a multiplication and an addition count as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def operations(work: Work) -> float:
    """Floating-point operations of a bare step per image."""
    return flops(bare_step(replace(work, batch_size=2), Hardware(torch.device("cpu")))) / 2


def matmul(hardware: Hardware, smoke: bool) -> tuple[Callable[[], Timed], float]:
    """A large matrix product in the precision of training, and its operations."""
    side = 64 if smoke else 8192 if hardware.device.type == "cuda" else 2048
    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=hardware.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    return lambda: timed(lambda: torch.mm(a, b, out=product), 10), 2 * side**3


# --- Side by side -----------------------------------------------------------------------------------------


def _steps(seconds: float, work: Work, hardware: Hardware, smoke: bool) -> int:
    """So many steps that they can be timed, and that their images fit in memory."""
    wanted = math.ceil((1.0 if hardware.device.type == "cuda" else 4.0) / seconds)
    room = _IMAGES // (work.batch_size * 3 * work.size**2) - _WARM - 1
    return 1 if smoke else max(1, min(wanted, room, 200))


def measure(
    nets: tuple[str, ...], hardware: Hardware, rounds: int, scratch: Path, smoke: bool
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal)."""
    with in_its_own_process(papers_loops, hardware.device) as paper:
        return [row for net in nets for row in _net(net, hardware, rounds, scratch / net, smoke, paper)]


def _net(
    net: str, hardware: Hardware, rounds: int, scratch: Path, smoke: bool, paper: Callable[..., Timed]
) -> list[tuple[str, str, str]]:
    product, product_operations = matmul(hardware, smoke)
    candidates: dict[str, Callable[[], object]] = {"matmul": product}
    three = works(net, hardware, smoke)
    for work in three:
        step, seconds = ceiling(work, hardware)
        steps = _steps(seconds, work, hardware, smoke)
        candidates[f"{work.trainer} paper"] = partial(paper, work, steps)
        candidates[f"{work.trainer} aerl"] = aerls_loop(work, hardware, scratch / work.trainer, steps)
        candidates[f"{work.trainer} bare"] = partial(timed, step, steps)
    seconds_of = time_in_turns(candidates, rounds)
    gpu = hardware.device.type == "cuda"
    over_paper = {"sl": ">= 3", "rl_adv": ">= 5"} if gpu else {"sl": ">= 1.3"}
    rows = []
    for work in three:
        theirs, ours, bare = (seconds_of[f"{work.trainer} {name}"] for name in ("paper", "aerl", "bare"))
        rate, their_rate, bare_rate = (
            f"{work.batch_size / statistics.median(each):,.0f}" for each in (ours, theirs, bare)
        )
        rows.append(
            (
                f"{work}: images/s over the paper's loop",
                f"{ratio(theirs, ours):.2f} ({rate} against {their_rate})",
                over_paper.get(work.trainer, ""),
            )
        )
        rows.append(
            (
                f"{work}: images/s over the bare step's",
                f"{ratio(bare, ours):.2f} ({rate} against {bare_rate})",
                ">= 0.85" if gpu else ">= 0.90",
            )
        )
        count = operations(work)
        share = ratio(seconds_of["matmul"], ours) * count * work.batch_size / product_operations
        speed = count * work.batch_size / statistics.median(ours)
        rows.append(
            (
                f"{work}: share of the matmul peak in {hardware.precision}",
                f"{share:.0%} ({count / 1e9:.3g} GFLOP an image, {speed / 1e12:.3g} TFLOP/s)",
                ">= 30 %" if gpu and hardware.precision == "bf16" else "",
            )
        )
    share = product_operations / statistics.median(seconds_of["matmul"]) / 1e12
    rows.append((f"matmul in {hardware.precision}", f"{share:.3g} TFLOP/s", ""))
    rows.append(
        (
            f"{three[2]}: time of a step over rl's",
            f"{ratio(seconds_of['rl_adv aerl'], seconds_of['rl aerl']):.2f}",
            "<= 2.8",
        )
    )
    return rows

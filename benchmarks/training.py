"""Training steps: aerl's loop against the loop of the paper's code, and an rl_adv step against an rl step."""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from aerl.attacks import pgd
from aerl.data import Batches, Split, augment, to_unit
from aerl.hardware import Hardware, stream
from aerl.models import CNN, Classifier
from aerl.objectives import EpsilonGreedy, Labels
from aerl.train import Adversary, Recipe, train_step
from benchmarks.paired import in_its_own_process, ratio, time_in_turns


class PerImage(Dataset[tuple[Tensor, int]]):
    """The paper's data pipeline: every image is a PIL image, augmented and normalised one at a time."""

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
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class PaddedByPyTorch(CNN):
    """The 6-layer CNN with padding="same", the usual way to write its even kernels."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        for i in range(1, 7):
            conv = getattr(self, f"conv{i}")
            setattr(self, f"conv{i}", nn.Conv2d(conv.in_channels, conv.out_channels, 4, padding="same"))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 7):
            x = self.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            if i % 2 == 0:
                x = self.dropouts[i // 2 - 1](self.pool(x))
        x = self.relu(self.bn7(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(self.dropouts[3](x))
        return logits


def random_split(count: int) -> Split:
    """Real pixels would not change the time of a step; random ones need no file."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def cnn(width: float, hardware: Hardware) -> Classifier:
    torch.manual_seed(0)
    return hardware.place(
        Classifier(CNN(num_classes=10, channels=3, size=(32, 32), width=width), (0.5,) * 3, (0.25,) * 3)
    )


def forever(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def papers_loop(split: Split, batch_size: int, width: float, device: torch.device):  # type: ignore[no-untyped-def]
    """One step per call: DataLoader with 2 workers, contiguous layout, fp32, cross-entropy, AdamW, clipping."""
    torch.manual_seed(0)
    model = PaddedByPyTorch(num_classes=10, channels=3, size=(32, 32), width=width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    loader = DataLoader(
        PerImage(split), batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    batches = forever(loader)

    def step() -> float:
        x, y = (t.to(device) for t in next(batches))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def aerls_loop(split: Split, recipe: Recipe, width: float, hardware: Hardware):  # type: ignore[no-untyped-def]
    """One step per call, as `aerl.train.fit` does it."""
    model = cnn(width, hardware)
    model.train()
    optimizer = recipe.optimizer(model.parameters())
    batches = Batches(split, recipe.batch_size, hardware.device, drop_last=True)
    generator = stream(0, "actions", device=hardware.device)
    epochs = (batch for epoch in range(10**9) for batch in batches.epoch(stream(0, "batches", epoch)))

    def step() -> float:
        images, y = next(epochs)
        x = to_unit(recipe.augment(images, generator), hardware.memory_format)
        with hardware.autocast():
            outcome = train_step(model, x, y, recipe.act, generator, adversary=recipe.adversary)
        optimizer.zero_grad()
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return outcome.loss.item()

    return step


def recipe(batch_size: int, *, rl: bool = False, adversary: bool = False) -> Recipe:
    fgsm = Adversary(
        lambda model, x, y, *, generator: pgd(
            model, x, y, generator=generator, norm="Linf", eps=0.01, steps=1, step_size=0.01,
            random_start=False, drop_fooled=False, keep="last",
        ),
        weight=1.0,
        start_epoch=0,
    )  # fmt: skip
    return Recipe(
        epochs=1,
        batch_size=batch_size,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4),
        act=EpsilonGreedy(0.1) if rl else Labels(),
        adversary=fgsm if adversary else None,
        augment=lambda images, generator: augment(images, generator, hflip=0.5, vflip=0.5, translate=0.1),
    )


def measure(hardware: Hardware, rounds: int, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal)."""
    batch_size, width = (32, 0.1) if smoke else (256, 1.0)
    split = random_split(4 * batch_size)
    seconds = time_in_turns(
        {
            # by itself, because hardware.set_up has told this process how to use its memory
            "paper": in_its_own_process(papers_loop, split, batch_size, width, hardware.device),
            "sl": aerls_loop(split, recipe(batch_size), width, hardware),
            "rl": aerls_loop(split, recipe(batch_size, rl=True), width, hardware),
            "rl_adv": aerls_loop(split, recipe(batch_size, rl=True, adversary=True), width, hardware),
        },
        rounds,
    )
    shape = f"6-layer CNN{f' x{width}' if width != 1 else ''}, batch {batch_size}, 3x32x32"
    return [
        (
            f"sl step, {shape}: images/s over the paper's loop",
            f"{ratio(seconds['paper'], seconds['sl']):.2f}",
            ">= 1.3",
        ),
        (
            f"rl_adv step over rl step, {shape}: time",
            f"{ratio(seconds['rl_adv'], seconds['rl']):.2f}",
            "<= 2.8",
        ),
    ]

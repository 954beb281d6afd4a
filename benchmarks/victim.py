"""A trained, undefended AliCNN on 3x32x32 images, for the attacks to be timed on."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from aerl.data import DataSplits, Split, prepare
from aerl.data.sources import cifar, digits
from aerl.hardware import Hardware
from aerl.models import AliCNN, Classifier
from aerl.objectives import Labels
from aerl.results import ResultLog
from aerl.train import Recipe, fit


def images_32(cifar10: Path | None, data_dir: Path) -> DataSplits:
    """CIFAR-10 from a local copy, or the built-in digits enlarged to 3x32x32."""
    if cifar10 is None:
        source, identity, name = digits, {}, "digits"
    else:
        source = partial(cifar, variant="cifar10", data_dir=data_dir, path=str(cifar10))
        identity, name = {"path": str(cifar10)}, "cifar10"
    return prepare(
        source,
        identity=identity,
        data_dir=data_dir,
        name=name,
        size=32,
        channels=3,
        val_fraction=0.1,
        split_seed=42,
    )


def trained(data: DataSplits, hardware: Hardware, folder: Path, images: int) -> Classifier:
    """Trained for three epochs on the first `images` training images."""
    torch.manual_seed(0)
    net = AliCNN(num_classes=data.num_classes, channels=3, size=(32, 32))
    model = hardware.place(Classifier(net, data.mean, data.std))
    few = replace(data, train=Split(data.train.images[:images], data.train.labels[:images]))
    recipe = Recipe(epochs=3, batch_size=64, optimizer=partial(torch.optim.AdamW, lr=1e-3), act=Labels())
    identity = {"run_id": "victim", "seed": 0, "dataset": "", "model": "alicnn", "trainer": "sl"}
    fit(model, few, recipe, hardware, seed=0, folder=folder / "victim", results=ResultLog(folder, identity))
    return model

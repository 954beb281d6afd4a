"""Trained AliCNNs on 3x32x32 images, undefended and adversarially trained, for the attacks to be timed on."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from aerl.attacks import pgd
from aerl.data import DataSplits, Split, prepare
from aerl.data.sources import cifar, digits
from aerl.models import AliCNN, Classifier
from aerl.runtime.device import Hardware
from aerl.tracking.results import ResultLog
from aerl.training.loop import Adversary, Recipe, fit
from aerl.training.objectives import Labels, adversarial_training

Defence = Literal["undefended", "pgd_at"]


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


def trained(
    data: DataSplits, hardware: Hardware, folder: Path, images: int, defence: Defence = "undefended"
) -> Classifier:
    """Trained for three epochs on the first `images` training images; `pgd_at` on PGD-5, L2 eps 0.5."""
    torch.manual_seed(0)
    net = AliCNN(num_classes=data.num_classes, channels=3, size=(32, 32))
    model = hardware.place(Classifier(net, data.mean, data.std))
    few = replace(
        data,
        train=Split(data.train.images[:images], data.train.labels[:images]),
        val=Split(data.val.images[: images // 8], data.val.labels[: images // 8]),
    )
    attack = partial(pgd, norm="L2", eps=0.5, steps=5, step_size=0.15, loss="ce", drop_fooled=False, keep="last")
    recipe = Recipe(
        epochs=3,
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        objective=partial(adversarial_training, act=Labels(), probability_floor=0.0),
        adversary=Adversary(attack) if defence == "pgd_at" else None,
    )
    folder = folder / defence
    folder.mkdir()
    log = ResultLog(folder, {"run_id": "", "seed": 0, "dataset": "", "model": "alicnn", "trainer": defence})
    fit(model, few, recipe, hardware, seed=0, folder=folder, results=log)
    return model.eval()

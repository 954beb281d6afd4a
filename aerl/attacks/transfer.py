"""Transfer: examples crafted on the models of other runs, and PGD that starts from them."""

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from aerl.attacks.modes import NoGradient, warn
from aerl.attacks.pgd import pgd
from aerl.attacks.random import Noise, SampleGenerator
from aerl.runtime.files import load_arrays, save_arrays, writing
from aerl.types import Count, Index, NonNegative, Norm, UserError

_log = logging.getLogger("aerl.attacks")

Loss = Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr"]


class Crafted:
    """White-box adversarial examples on one model, made once and stored.

    `crafted(x, y)` maps images x (B, C, H, W) in [0, 1] of classes y (B,) to images within `eps` of them: by
    PGD on `model` from a random start, all its `steps`, of which the iterate with the highest loss is taken.
    An attack that stops at the decision boundary of its source fools little else.

    They are stored in `folder`, one subfolder for each model (its structure, weights and source code), settings and
    seed, and are found by the image itself: an example depends on no other image of its batch. A process that is
    killed loses its current batch. Processes may share the folder. A damaged file is logged and not read.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        norm: Norm,
        eps: float,
        steps: int,
        step_size: float | None,
        loss: Loss,
        seed: int,
    ) -> None:
        self.model, self.seed = model, seed
        step_size = eps / 10 if step_size is None else step_size
        self.settings: dict[str, Any] = {
            "norm": norm, "eps": eps, "steps": steps, "step_size": step_size, "loss": loss,
        }  # fmt: skip
        self.folder = folder / _identity(model, seed, self.settings)
        self._read: set[Path] = set()
        self._stored: dict[bytes, tuple[Path, int]] = {}  # the file and the row of each example

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Raises UserError as pgd does, also for an empty batch, and where the disk refuses."""
        keys = _keys(x, y)
        crafted = torch.empty_like(x)
        missing = self._load(crafted, keys)
        if missing or not keys:
            rows = torch.tensor(missing, dtype=torch.int64, device=x.device)
            noise = SampleGenerator.for_images(x[rows], self.seed, salt="transfer")
            crafted[rows] = pgd(self.model, x[rows], y[rows], generator=noise, drop_fooled=False, **self.settings)
            self._save([keys[row] for row in missing], crafted[rows])
        return crafted

    def _load(self, crafted: Tensor, keys: list[bytes]) -> list[int]:
        """Copy stored examples into their rows of `crafted`; returns the other rows."""
        if not self._stored.keys() >= set(keys):
            self._find_files()
        places: dict[Path, list[tuple[int, int]]] = {}
        for row, key in enumerate(keys):
            if key in self._stored:
                path, place = self._stored[key]
                places.setdefault(path, []).append((row, place))
        missing = set(range(len(keys)))
        for path, pairs in places.items():
            rows, stored = map(list, zip(*pairs, strict=True))
            if arrays := _load(path):
                crafted[rows] = torch.from_numpy(arrays["examples"][stored]).to(crafted)
                missing -= set(rows)
        return sorted(missing)

    def _find_files(self) -> None:
        """Index the files that this and other processes have added."""
        for path in sorted(set(self.folder.glob("*.npz")) - self._read):
            self._index(path, [key.tobytes() for key in _load(path).get("keys", ())])

    def _save(self, keys: list[bytes], examples: Tensor) -> None:
        if not keys:
            return
        path = self.folder / f"{_digest(keys).hex()}.npz"
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {"keys": rows, "examples": examples.cpu().numpy()})
        self._index(path, keys)

    def _index(self, path: Path, keys: list[bytes]) -> None:
        self._read.add(path)
        self._stored |= {key: (path, row) for row, key in enumerate(keys)}


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_arrays(path)
    except UserError as error:
        _log.warning("%s; its examples are crafted again", error)
        return {}


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _keys(x: Tensor, y: Tensor) -> list[bytes]:
    """One key for each image with its label."""
    images, labels = x.detach().cpu().contiguous().numpy(), y.cpu().numpy()
    return [_digest([image.tobytes(), label.tobytes()]) for image, label in zip(images, labels, strict=True)]


def _identity(model: nn.Module, seed: int, settings: Mapping[str, Any]) -> str:
    text = json.dumps(["sealed", repr(model), _code(model), seed, settings], sort_keys=True)
    parts: list[bytes | memoryview] = [text.encode()]
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):  # state_dict lacks some buffers
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [name.encode(), raw.numpy().data]
    return _digest(parts).hex()


def _code(model: nn.Module) -> list[str]:
    """Digests of the source files of the model's classes, but for torch's own."""
    files = set()
    for kind in {type(module) for module in model.modules()}:
        if not f"{kind.__module__}.".startswith("torch."):
            with suppress(TypeError):  # a class without a file
                files.add(inspect.getsourcefile(kind))
    return sorted(_digest([Path(file).read_bytes()]).hex() for file in files if file and Path(file).is_file())


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Transfer attacks as `attack(model, x, y, *, generator)`: examples crafted on other models.

    Where they fool the model and its own gradients do not, those are masked (Athalye et al. 2018, section 3.1:
    black-box attacks better than white-box ones). Returns a dict with, for each source, the images under
    `<its name>`, and under `<its name>_refined` those that PGD on the attacked model reaches from there.

    sources: run folders, or .pt files in them.
    seed: of the crafting's random starts. Not the run's own, so that the same examples serve every run.
    norm, eps, steps, step_size, loss: of PGD, on the source and in the refinement; see `pgd`.
    refine: whether to go on from the transferred images in the attacked model, where it still resists.
    drop_fooled: whether the refinement stops where it succeeds; see `pgd`. The source's own PGD never does.
    load: `load(runs, key=...)` gives the models of runs under short names; `key` is for its UserError.
    store: the folder in which examples are stored; see `Crafted`.
    """

    sources: list[str]
    norm: Norm = "L2"
    eps: NonNegative
    steps: Count = 100
    step_size: NonNegative | None = None
    loss: Loss = "log_odds"
    seed: Index = 0
    refine: bool = True
    drop_fooled: bool = True
    load: Callable[..., Mapping[str, nn.Module]]
    store: Path

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources=[]: name one run folder or more whose models the examples are made on")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise) -> dict[str, Tensor]:
        """Attack images x (B, C, H, W) in [0, 1] of classes y (B,).

        Raises UserError, also for an empty batch, where a source cannot be loaded, and as `pgd` does.
        """
        found = {}
        for name, crafted in self._crafted.items():
            found[name] = start = crafted(x, y)
            if self.refine:
                found[f"{name}_refined"] = self._refined(model, x, y, start, generator)
        return found

    def _refined(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, generator: Noise) -> Tensor:
        try:
            return pgd(model, x, y, generator=generator, start=start, drop_fooled=self.drop_fooled, **self._pgd)
        except NoGradient as error:  # the transferred images need none
            warn(f"not refined: {error}")
            return start

    @property
    def _pgd(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("norm", "eps", "steps", "step_size", "loss")}

    @cached_property
    def _crafted(self) -> dict[str, Crafted]:
        models = self.load(self.sources, key="sources")
        return {name: Crafted(model, self.store, seed=self.seed, **self._pgd) for name, model in models.items()}

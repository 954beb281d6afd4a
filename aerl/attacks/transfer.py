"""Transfer: examples crafted on the models of other runs, and PGD that starts from them."""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from aerl.attacks.direct import noise_of
from aerl.attacks.modes import NoGradient, warn
from aerl.attacks.pgd import pgd
from aerl.attacks.random import SampleGenerator, Seed
from aerl.errors import UserError
from aerl.runtime.files import load_arrays, save_arrays, writing
from aerl.types import Count, Index, NonNegative, Norm

Loss = Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr"]


class Crafted:
    """PGD examples on one model: `crafted(x, y)` crafts each of them once and stores it in `folder`.

    All `steps` are taken from a random start, and the iterate of the highest loss is returned: an attack that stops at
    the decision boundary of its source fools little else.

    Each model (structure, weights, source files) with its `settings` (norm, eps, steps, step_size, loss) and seed has a
    subfolder, with one file per crafted batch. Processes may share it.
    """

    def __init__(self, model: nn.Module, folder: Path, *, seed: int, **settings: Any) -> None:
        self.model, self.seed, self.settings = model, seed, settings
        self.folder = folder / _identity(model, seed, settings)
        self._files: dict[Path, list[bytes]] = {}  # the keys of the examples in each

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Raises UserError as `pgd` does, also for an empty batch."""
        images, labels = x.detach().cpu().contiguous().numpy(), y.cpu().numpy()
        keys = [_digest([image.tobytes(), label.tobytes()]) for image, label in zip(images, labels, strict=True)]
        examples = self._read(set(keys))
        missing = [row for row, key in enumerate(keys) if key not in examples]
        if missing or not keys:
            rows = torch.tensor(missing, dtype=torch.int64, device=x.device)
            noise = SampleGenerator.for_images(x[rows], self.seed, salt="transfer")
            crafted = pgd(self.model, x[rows], y[rows], generator=noise, drop_fooled=False, **self.settings)
            examples |= self._write([keys[row] for row in missing], crafted.cpu().numpy())
        found = torch.empty_like(x)
        for row, key in enumerate(keys):
            found[row] = torch.from_numpy(examples[key])
        return found

    def _read(self, keys: set[bytes]) -> dict[bytes, np.ndarray]:
        """The stored examples with these keys, and others."""
        for path in sorted(set(self.folder.glob("*.npz")) - self._files.keys()):  # other processes add files, too
            self._files[path] = [key.tobytes() for key in _load(path).get("keys", ())]
        examples: dict[bytes, np.ndarray] = {}
        for path, stored in self._files.items():
            if not keys.isdisjoint(stored):
                examples |= zip(stored, _load(path).get("examples", ()), strict=False)  # a damaged file has none
        return examples

    def _write(self, keys: list[bytes], examples: np.ndarray) -> dict[bytes, np.ndarray]:
        if keys:
            path = self.folder / f"{_digest(keys).hex()}.npz"
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            save_arrays(path, {"keys": [np.frombuffer(key, np.uint8) for key in keys], "examples": examples})
            self._files[path] = keys
        return dict(zip(keys, examples, strict=True))


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_arrays(path)
    except UserError as error:
        logging.getLogger("aerl.attacks").warning("%s; crafting its examples again", error)
        return {}


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _identity(model: nn.Module, seed: int, settings: Mapping[str, Any]) -> str:
    """A digest of the settings and of the model's structure, source files, parameters and buffers."""
    files = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in model.modules()}
    code = sorted(_digest([Path(file).read_bytes()]).hex() for file in files if file and Path(file).is_file())
    parts: list[bytes | memoryview] = [json.dumps([repr(model), code, seed, settings], sort_keys=True).encode()]
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):  # state_dict lacks some buffers
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [name.encode(), raw.numpy().data]
    return _digest(parts).hex()


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Transfer attacks as `attack(model, x, y, *, generator)`: examples crafted on other models.

    If they fool the model and its own gradients do not, those are masked (Athalye et al. 2018, section 3.1). Returns
    for each source the images under its name, and under `<name>_refined` those that PGD reaches from there.

    sources: run folders, or .pt files in them.
    seed: of the crafting's random starts. Not the run's own, so that the same examples serve every run.
    norm, eps, steps, step_size, loss: of PGD, on the source and in the refinement; see `pgd`.
    refine: whether PGD on the attacked model continues from the transferred images.
    drop_fooled: whether the refinement stops where it succeeds; see `pgd`.
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

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Seed = None) -> dict[str, Tensor]:
        """Attack images x (B, C, H, W) in [0, 1] of classes y (B,).

        Raises UserError, also for an empty batch, if a source cannot be loaded, and as `pgd` does.
        """
        generator = noise_of(model, x, y, generator)
        found = {}
        for name, crafted in self._crafted.items():
            found[name] = start = crafted(x, y)
            if self.refine:
                try:
                    refined = pgd(
                        model, x, y, generator=generator, start=start, drop_fooled=self.drop_fooled, **self._settings
                    )
                except NoGradient as error:  # the transferred images need none
                    warn(f"not refined: {error}")
                    refined = start
                found[f"{name}_refined"] = refined
        return found

    @property
    def _settings(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("norm", "eps", "steps", "step_size", "loss")}

    @cached_property
    def _crafted(self) -> dict[str, Crafted]:
        if not self.sources:
            raise UserError("sources=[]: expected at least one run folder")
        models = self.load(self.sources, key="sources")
        return {name: Crafted(model, self.store, seed=self.seed, **self._settings) for name, model in models.items()}

"""Transfer: examples crafted on the models of other runs, and PGD that starts from them."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping
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
from aerl.runtime.files import atomic_write, writing
from aerl.types import Count, Index, NonNegative, Norm, UserError

_log = logging.getLogger("aerl.attacks")

Loss = Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr"]


class Crafted:
    """White-box adversarial examples on one model, made once and kept, whichever models they then meet.

    `crafted(x, y)` maps images x (B, C, H, W) in [0, 1] of classes y (B,) to images within `eps` of them: by
    PGD on `model` from a random start, all its `steps`, of which the iterate with the highest loss is taken.
    An attack that stops at the decision boundary of its source fools little else.

    They are kept in `folder`, apart for each model (its structure, weights and source code), settings and seed,
    and found again by the image itself: an example depends on no other image of its batch. A process that is
    killed loses the batch it is at, and any number of processes may share the folder. A file that is not as it
    was written is passed over, which is logged.
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
        self.settings: dict[str, Any] = {
            "norm": norm,
            "eps": eps,
            "steps": steps,
            "step_size": eps / 10 if step_size is None else step_size,
            "loss": loss,
        }
        self.folder = folder / _identity(model, seed, self.settings)
        self._chunks: set[Path] = set()
        self._places: dict[bytes, tuple[Path, int]] = {}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Raises UserError as pgd does, also for an empty batch, and where the disk refuses."""
        keys = _keys(x, y)
        crafted = torch.empty_like(x)
        missing = self._fill(crafted, keys)
        if missing or not keys:
            rows = torch.tensor(missing, dtype=torch.int64, device=x.device)
            crafted[rows] = made = self._craft(x[rows], y[rows])
            self._keep([keys[row] for row in missing], made)
        return crafted

    def _craft(self, x: Tensor, y: Tensor) -> Tensor:
        noise = SampleGenerator.for_images(x, self.seed, salt="transfer")
        return pgd(self.model, x, y, generator=noise, drop_fooled=False, keep="worst", **self.settings)

    def _fill(self, crafted: Tensor, keys: list[bytes]) -> list[int]:
        """Put what is on the disk in its rows of `crafted`; returns the other rows."""
        if not self._places.keys() >= set(keys):
            self._look_for_chunks()
        wanted: dict[Path, dict[int, int]] = {}
        for row, key in enumerate(keys):
            if key in self._places:
                path, place = self._places[key]
                wanted.setdefault(path, {})[row] = place
        missing = set(range(len(keys)))
        for path, places in wanted.items():
            if (chunk := _read(path)) is not None:
                found = torch.from_numpy(chunk["examples"][list(places.values())])
                crafted[list(places)] = found.to(crafted)
                missing -= places.keys()
        return sorted(missing)

    def _look_for_chunks(self) -> None:
        """Take note of what other processes have added."""
        for path in sorted(set(self.folder.glob("*.npz")) - self._chunks):
            self._chunks.add(path)
            if (chunk := _read(path)) is not None:
                self._places |= {key.tobytes(): (path, place) for place, key in enumerate(chunk["keys"])}

    def _keep(self, keys: list[bytes], examples: Tensor) -> None:
        if not keys:
            return
        path = self.folder / f"{_digest(*keys).hex()}.npz"
        names = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        chunk: dict[str, Any] = {"keys": names, "examples": examples.cpu().numpy()}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: np.savez(file, digest=_sealed(chunk), **chunk))
        self._chunks.add(path)
        self._places |= {key: (path, place) for place, key in enumerate(keys)}


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _keys(x: Tensor, y: Tensor) -> list[bytes]:
    """What tells an image and its label from every other."""
    images, labels = x.detach().cpu().contiguous().numpy(), y.cpu().numpy()
    return [_digest(image.tobytes(), label.tobytes()) for image, label in zip(images, labels, strict=True)]


def _identity(model: nn.Module, seed: int, settings: Mapping[str, Any]) -> str:
    # Not the state_dict, which leaves out what is not persistent.
    weights = (
        part
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        for part in (
            name.encode(),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data,
        )
    )
    told = json.dumps([repr(model), _code(model), seed, settings], sort_keys=True)
    return _digest(told.encode(), *weights).hex()


def _code(model: nn.Module) -> list[str]:
    """Digests of the source files of the model's classes, but for torch's own."""
    files = set()
    for kind in {type(module) for module in model.modules()}:
        if not f"{kind.__module__}.".startswith("torch."):
            with suppress(TypeError):  # it was made where there is no file
                files.add(inspect.getsourcefile(kind))
    return sorted(_digest(Path(file).read_bytes()).hex() for file in files if file and Path(file).is_file())


def _sealed(chunk: Mapping[str, Any]) -> Any:
    """The digest of a chunk's arrays, as an array."""
    parts = (
        (f"{array.dtype}{array.shape}".encode(), array.tobytes())
        for array in (chunk[name] for name in ("keys", "examples"))
    )
    return np.frombuffer(_digest(*chain.from_iterable(parts)), np.uint8)


def _read(path: Path) -> Mapping[str, Any] | None:
    """A chunk's arrays; None where it is damaged, which costs no more than crafting its examples again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            chunk = dict(file)
        if not np.array_equal(chunk["digest"], _sealed(chunk)):
            raise ValueError("its digest is another one")
        return chunk
    except Exception as error:  # what a damaged file makes NumPy raise depends on where it is damaged
        _log.warning("%s is damaged and passed over (%s)", path, error)
        return None


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
    store: the folder in which examples are kept; see `Crafted`.
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
        except NoGradient as error:  # what was transferred needs none
            warn(f"not refined: {error}")
            return start

    @property
    def _pgd(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("norm", "eps", "steps", "step_size", "loss")}

    @cached_property
    def _crafted(self) -> dict[str, Crafted]:
        return {
            name: Crafted(source, self.store, seed=self.seed, **self._pgd)
            for name, source in self.load(self.sources, key="sources").items()
        }

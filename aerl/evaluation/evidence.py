"""Evidence: for every image that an attack fooled, the adversarial image that did it, in evidence.npz of the run.

While attacks run, the images are in progress.npy, whose rows are written before progress.npz says that they are done.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aerl.evaluation.outcomes import Outcomes
from aerl.evaluation.statistics import right
from aerl.runtime.files import save_arrays, writing

NAME, _UNFINISHED = "evidence.npz", "progress.npy"
LIMIT = 256 << 20  # bytes of images, above which they are kept on request only


class Evidence:
    """The first adversarial image of each sample. Images are float32 (C, H, W); there are n samples."""

    def __init__(self, folder: Path, n: int, shape: tuple[int, ...], fresh: np.ndarray) -> None:
        """`fresh` bool (n,): the samples that no attack that counts has fooled yet."""
        self.fresh = fresh.copy()
        path = folder / _UNFINISHED
        with writing(path):
            mode = "r+" if path.is_file() else "w+"
            self.images = np.lib.format.open_memmap(path, mode, np.float32, (n, *shape))

    def keep(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Keep the adversarial images (m, C, H, W) of these samples, if they are the first."""
        new = self.fresh[rows]
        self.images[rows[new]] = images[new]
        self.fresh[rows] = False


def wanted(request: bool | None, n: int, shape: Sequence[int]) -> bool:
    """Whether to keep evidence: on request, or if n images of this shape are small enough."""
    return 4 * n * int(np.prod(shape)) <= LIMIT if request is None else request


def finish(folder: Path, outcomes: Outcomes, counted: Sequence[str]) -> None:
    """Write evidence.npz: `row` (m,) in outcomes.npz, the `attack` (m,) and the adversarial `images` (m, C, H, W)."""
    rows, attacks = first_fooled(outcomes, counted)
    path = folder / _UNFINISHED
    if len(rows) and path.is_file():
        images = np.load(path, mmap_mode="r")[rows]
        save_arrays(folder / NAME, {"row": rows, "attack": attacks, "images": images}, compressed=True)
    discard(folder)


def discard(folder: Path, *names: str) -> None:
    for name in (_UNFINISHED, *names):
        (folder / name).unlink(missing_ok=True)


def first_fooled(outcomes: Mapping[str, np.ndarray], counted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The samples (m,) that are right when clean and that some attack fooled; the first attack (m,) that did."""
    attacks = np.full(len(outcomes["label"]), "", dtype=f"<U{max(map(len, counted), default=1)}")
    still = right(outcomes)
    for name in counted:
        fooled = still & (outcomes[f"{name}_pred"] != outcomes["label"])
        attacks[fooled] = name
        still &= ~fooled
    rows = np.flatnonzero(attacks != "")
    return rows, attacks[rows]

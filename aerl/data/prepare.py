"""Prepared datasets: checked, split, resized, and written once as .npy files under `data_dir`.

    <data_dir>/prepared/<name>-<key>/{train,val,test}_{images,labels}.npy, meta.json

The key is `aerl.tracking.inputs` of all that decides the content, so that nothing stale is ever read. A folder
appears under its name complete or not at all. meta.json holds the SHA-256 of itself and of the arrays; an array is
checked again if its file was touched since. A prepared folder needs neither the source nor its libraries.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from aerl.data.sources import Source, few, reading
from aerl.data.splits import DataSplits, Split
from aerl.errors import UserError, first_line
from aerl.runtime.files import atomic_write
from aerl.tracking.inputs import fingerprint, stamp

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

HELD_OUT = 0.2  # of a dataset that comes without a test split
DATASET_SEED = 42  # such a split belongs to the dataset: it must not change with the run's seed
BLOCK = 128  # images that one thread decodes at a time
PARTS = ("train", "val", "test")
GREY = ("1", "L", "LA", "La")  # PIL's modes without colour

log = logging.getLogger("aerl")


def prepare(
    source: Callable[[], Source],
    *,
    identity: Mapping[str, Any],
    data_dir: Path | str,
    name: str,
    size: int | None,
    channels: Literal[1, 3] | None,
    val_fraction: float,
    split_seed: int,
    memory_limit: int = 2 << 30,
) -> DataSplits:
    """The three splits of a dataset, from the cache if they are there already.

    `identity` is the source's target and keyword arguments. `size` scales the shorter side of each image and cuts out
    the middle; `size` and `channels` None are those of the first training image. `val_fraction` of the training images,
    in (0, 1), become the validation split, stratified by class. Splits that together have more than `memory_limit`
    bytes are memory-mapped. Raises UserError for data that cannot be trained on or a `data_dir` that cannot be written.
    """
    where = f"dataset.path={identity['path']}" if identity.get("path") else f"dataset={name}"
    recipe: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
    }
    with reading(f"{where}: cannot be read"):
        key = fingerprint(identity, recipe)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100]
    folder = Path(data_dir).expanduser() / "prepared" / f"{slug}-{key}"
    if (data := _load(folder, memory_limit, logging.DEBUG)) is not None:
        return data
    log.info("preparing %s, or waiting for another process that does", name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{slug}.lock").open("a") as lock:
            with suppress(OSError):  # a file system without locks: both prepare the same, and the last to finish wins
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (data := _load(folder, memory_limit)) is None:
                _replace(folder, partial(_build, source, where=where, **recipe))
                data = _read(folder, memory_limit)
            return data
    except OSError as error:
        raise UserError(f"data_dir={data_dir}: cannot hold the prepared data ({first_line(error)})") from error


# --- The cache -------------------------------------------------------------------------------------------


def _replace(folder: Path, build: Callable[[Path], None]) -> None:
    """Put what `build` writes into an empty folder in the place of `folder`, once it is complete."""
    for old in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch, "prepared")
        new.mkdir()
        build(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def _load(folder: Path, memory_limit: int, level: int = logging.WARNING) -> DataSplits | None:
    """The prepared splits, or None if there are none or they are damaged, which is logged at this level."""
    try:
        return _read(folder, memory_limit) if folder.exists() else None
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        log.log(level, "the prepared data in %s are damaged (%s) and are prepared again", folder, first_line(error))
        return None


def _read(folder: Path, memory_limit: int) -> DataSplits:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta.pop("sha256") != _sha256(meta):
        raise ValueError("meta.json was changed or damaged")
    mapped = sum(math.prod(meta["arrays"][f"{part}_images"]["shape"]) for part in PARTS) > memory_limit
    arrays = {}
    for name, expected in meta["arrays"].items():
        path, dtype = folder / f"{name}.npy", np.uint8 if name.endswith("images") else np.int64
        # Copy on write, because torch wants memory that may be written to.
        array = np.load(path, mmap_mode="c" if mapped and dtype == np.uint8 else None, allow_pickle=False)
        same = stamp(path) == expected["checked"] or _content(array) == expected["sha256"]
        if not same or array.dtype != dtype or list(array.shape) != expected["shape"]:
            raise ValueError(f"{path.name} was changed or damaged")
        arrays[name] = torch.from_numpy(array)
    splits = {part: Split(arrays[f"{part}_images"], arrays[f"{part}_labels"], mapped) for part in PARTS}
    names, mean, std = (tuple(meta[key]) for key in ("class_names", "mean", "std"))
    return DataSplits(**splits, class_names=names, mean=mean, std=std, digest=meta["digest"],
                      test_only=meta.get("test_only", False))  # fmt: skip


def _content(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(array.reshape(-1).data).hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- Building --------------------------------------------------------------------------------------------


def _build(source: Callable[[], Source], folder: Path, *, where: str, **recipe: Any) -> None:
    """Open the source and write the prepared data."""
    with reading(f"{where}: cannot be used"):
        origin = source()
        labels, test_labels, names = _number(origin)
        train, test = np.arange(len(labels)), np.arange(len(test_labels))
        if origin.test is None:
            log.info("there is no labelled test split: %.0f %% of the images are held out", 100 * HELD_OUT)
            train, test = _stratified_split(labels, HELD_OUT, DATASET_SEED)
        first = _picture(origin.train.images[int(train[0])])
    if origin.test_only:  # nothing is trained on them
        val = train
    else:
        with reading(f"dataset.val_fraction={recipe['val_fraction']}: cannot split {len(train)} images"):
            rows, val = _stratified_split(labels[train], recipe["val_fraction"], recipe["split_seed"])
        train, val = train[rows], train[val]
    log.info("preparing %d train, %d val and %d test images of %d classes (%s)", len(train), len(val), len(test),
             len(names), few(names))  # fmt: skip
    grey = first.mode in GREY if recipe["channels"] is None else recipe["channels"] == 1
    convert = partial(_convert, size=recipe["size"], grey=grey, lossy=recipe["channels"] is not None)
    shape = (1 if grey else 3, *(2 * [recipe["size"]] if recipe["size"] else (first.height, first.width)))
    arrays = {}
    for part, rows in (("train", train), ("val", val), ("test", test)):
        split, table, numbers = "train", origin.train, labels
        if part == "test" and origin.test is not None:
            split, table, numbers = "test", origin.test, test_labels
        what = f"{where}: {split} image"
        pixels = _write_images(folder / f"{part}_images.npy", table.images, rows, convert, shape, what)
        if part == "train":
            mean, std = _mean_and_std(pixels)
        atomic_write(folder / f"{part}_labels.npy", partial(np.save, arr=numbers[rows]))
        for key, array in ((f"{part}_images", pixels), (f"{part}_labels", numbers[rows])):
            arrays[key] = {"shape": array.shape, "sha256": _content(array), "checked": stamp(folder / f"{key}.npy")}
    if max(std) == 0:
        raise UserError(f"{where}: all pixels of the train images have the same value")
    digest = _sha256([names, [[key, arrays[key]["shape"], arrays[key]["sha256"]] for key in sorted(arrays)]])
    meta: dict[str, Any] = {"digest": digest, "class_names": names, "mean": mean, "std": std, "arrays": arrays}
    meta["test_only"] = origin.test_only
    atomic_write(folder / "meta.json", json.dumps({**meta, "sha256": _sha256(meta)}, indent=1))


def _number(origin: Any) -> tuple[Labels, Labels, list[str]]:
    """The labels of both splits as numbers of the classes, and the names of the classes."""
    import pandas as pd

    if not isinstance(origin, Source):
        raise ValueError(f"the source returned a {type(origin).__name__}; expected an aerl.data.Source")
    classes: Any = None
    numbered = []
    for split, table in (("train", origin.train), ("test", origin.test or origin.train)):
        labels = pd.Series(table.labels)
        if len(labels) == 0 or len(labels) != len(table.images):
            raise ValueError(f"the {split} split has {len(table.images)} images and {len(labels)} labels")
        if classes is None and isinstance(labels.dtype, pd.CategoricalDtype):
            classes = labels.cat.categories
        elif classes is None and labels.dtype.kind in "iuf":
            classes = range(len(origin.class_names or range(int(labels.max()) + 1)))
        elif classes is None:
            classes = origin.class_names or sorted(labels.dropna().unique())
        names = list(origin.class_names or map(str, classes))
        numbers = pd.Index(classes).get_indexer(labels).astype(np.int64)
        if numbers.min() < 0:
            row = numbers.argmin()
            raise ValueError(f"the label of {split} image {row} is {labels.iloc[row]}; expected one of {few(classes)}")
        absent = [names[number] for number in np.setdiff1d(np.arange(len(names)), numbers)]
        if len(names) - len(absent) < 2 and split == "train":
            raise ValueError("all training images are of one class; expected at least two")
        if absent:
            log.warning("the %s split has no image of %d of the %d classes (%s)", split, len(absent), len(names),
                        few(absent))  # fmt: skip
        numbered.append(numbers)
    return numbered[0], numbered[1], names


def _stratified_split(labels: Labels, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Two disjoint sets of rows, both ascending; the second has about `fraction` of every class."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    return np.sort(first), np.sort(second)


def _picture(image: Any) -> Any:
    """A PIL image, of a PIL image or of an array (H, W) or (H, W, C)."""
    from PIL import Image

    if not isinstance(image, np.ndarray):
        return image
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)


def _convert(image: Any, *, size: int | None, grey: bool, lossy: bool) -> Pixels:
    """The pixels (C, H, W) of one image; `lossy` allows to turn colour into grey."""
    from PIL import Image, ImageOps

    picture = _picture(image)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits: PIL mode {picture.mode}")
    if grey and picture.mode not in GREY and not lossy:
        raise ValueError("it is in colour and the first is not; set dataset.channels to 1 or 3")
    picture = picture.convert("L" if grey else "RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _write_images(
    path: Path, images: Any, rows: Labels, convert: Callable[[Any], Pixels], shape: tuple[int, ...], what: str
) -> Pixels:
    """Write these rows as an .npy file (N, C, H, W), which is returned as a memory map."""
    written = np.lib.format.open_memmap(path, "w+", np.uint8, shape=(len(rows), *shape))
    with path.open("r+b") as file:  # a full disk is an OSError here; later it would kill the process
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def write(block: range) -> None:
        for place in block:
            with reading(f"{what} {rows[place]} cannot be used"):
                pixels = convert(images[int(rows[place])])
                if pixels.shape != shape:
                    raise ValueError(f"its shape is {pixels.shape} and the first one's {shape}; set dataset.size")
                written[place] = pixels

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(write, (range(n, min(n + BLOCK, len(rows))) for n in range(0, len(rows), BLOCK))))
    written.flush()
    return written


def _mean_and_std(images: Pixels) -> tuple[list[float], list[float]]:
    """Of each channel, in [0, 1]; exact, because they come from counts of the 256 values."""
    counts: Any = sum(
        np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in image]) for image in images
    )
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean.tolist(), std.tolist()

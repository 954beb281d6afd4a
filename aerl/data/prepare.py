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
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from aerl.data.sources import Images, Rows, Source, few, one_line, stratified_split
from aerl.data.splits import DataSplits, Split
from aerl.runtime.files import atomic_write
from aerl.tracking.inputs import fingerprint, stamp
from aerl.types import UserError

Pixels = npt.NDArray[np.uint8]

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

    `identity` says what `source` opens (its target and keyword arguments, in JSON's types); a file or folder
    named by an argument counts with what the file system notes about it. `val_fraction` of the training images, in
    (0, 1), become the validation split, stratified by class. `size` scales each image so that its shorter
    side fits and cuts out the middle, size x size; None takes them as they are. `channels` None takes what
    the first training image has. The splits are held in memory if all three together have at most
    `memory_limit` bytes; else they are memory-mapped.

    Raises UserError for images or labels that cannot be trained on, and if `data_dir` cannot be written.
    """
    recipe: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
    }
    where = f"dataset.path={identity['path']}" if identity.get("path") else f"dataset={name}"
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100]
    try:
        key = fingerprint(identity, recipe)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({one_line(error)})") from error
    folder = Path(data_dir).expanduser() / "prepared" / f"{slug}-{key}"
    if (data := _load(folder, memory_limit, logging.DEBUG)) is not None:
        return data
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{slug}.lock"), name):
            data = _load(folder, memory_limit)  # another process may just have finished it
            if data is None:
                with _scratch(folder) as scratch:
                    _build(source, scratch, name, where, **recipe)
                data = _load(folder, memory_limit)
    except OSError as error:  # an OSError of the source has become a UserError before it gets here
        raise UserError(f"data_dir={data_dir}: cannot hold the prepared data of {name} ({one_line(error)})") from error
    if data is None:
        raise UserError(f"data_dir={data_dir}: {folder} is damaged and cannot be replaced; remove it")
    return data


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Let one process at a time download and prepare a dataset; the others wait and then find it done."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing %s: waiting for it", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # no locks there: two processes may prepare the same, and the first to finish wins
            log.info("%s cannot be locked (%s)", path, one_line(error))
        yield


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` if the block succeeds."""
    for old in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed: we hold the lock
        shutil.rmtree(old, ignore_errors=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        if folder.exists():  # damaged, or of a faster process where locks do not work
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- Reading ---------------------------------------------------------------------------------------------


def _load(folder: Path, memory_limit: int, level: int = logging.WARNING) -> DataSplits | None:
    """The prepared splits, or None if there are none or they are damaged, which is logged at this level."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("sha256") != _sha256(meta):
            raise ValueError("meta.json is not what was written")
        mapped = sum(math.prod(meta["arrays"][f"{part}_images"]["shape"]) for part in PARTS) > memory_limit
        splits = {}
        for part in PARTS:
            images = _load_array(folder / f"{part}_images.npy", meta, mapped)
            labels = _load_array(folder / f"{part}_labels.npy", meta, False)
            splits[part] = Split(torch.from_numpy(images), torch.from_numpy(labels), mapped)
        names, mean, std = (tuple(meta[key]) for key in ("class_names", "mean", "std"))
        return DataSplits(**splits, class_names=names, mean=mean, std=std, digest=meta["digest"])
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        log.log(level, "the prepared data in %s are damaged (%s) and are prepared again", folder, one_line(error))
        return None


def _load_array(path: Path, meta: Mapping[str, Any], mapped: bool) -> npt.NDArray[Any]:
    entry = meta["arrays"][path.stem]
    # Copy on write: torch wants memory that may be written to.
    array: npt.NDArray[Any] = np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)
    dtype = np.uint8 if path.stem.endswith("images") else np.int64
    same_form = array.dtype == dtype and list(array.shape) == entry["shape"]
    if not same_form or (stamp(path) != entry["checked"] and _content(array) != entry["sha256"]):
        raise ValueError(f"{path.name} is not what was written")
    return array


def _content(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(array.reshape(-1).data).hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- Building --------------------------------------------------------------------------------------------


def _build(
    source: Callable[[], Source],
    folder: Path,
    name: str,
    where: str,
    *,
    size: int | None,
    channels: int | None,
    val_fraction: float,
    split_seed: int,
) -> None:
    """Open the source and write the prepared data into an empty folder."""
    origin = _open(source, where)
    train, val = stratified_split(origin.train.labels, val_fraction, split_seed, f"dataset.val_fraction={val_fraction}")
    test = np.arange(len(origin.test.labels))
    log.info(
        "preparing %s: %s train, %s val and %s test images of %s classes (%s)", name, f"{len(train):,}",
        f"{len(val):,}", f"{len(test):,}", f"{len(origin.class_names):,}", few(origin.class_names),
    )  # fmt: skip
    try:  # what the settings leave open is that of the first training image
        first = _picture(origin.train.images[0])
        grey = channels == 1 or (channels is None and first.mode in GREY)
        convert = partial(_convert, size=size, grey=grey, lossy=channels is not None)
        shape = convert(first).shape
    except Exception as error:
        raise UserError(f"{where}: train image 0 cannot be used ({one_line(error)})") from error
    arrays: dict[str, Any] = {}
    for part, table, rows in zip(PARTS, (origin.train, origin.train, origin.test), (train, val, test), strict=True):
        split = f"{where}: {'test' if part == 'test' else 'train'}"
        images = _write_images(folder / f"{part}_images.npy", table.images, rows, convert, shape, split)
        if part == "train":
            mean, std = _mean_and_std(images)
            if max(std) == 0:
                raise UserError(f"{where}: all pixels of the train images have the same value")
        labels = table.labels[rows]
        atomic_write(folder / f"{part}_labels.npy", partial(np.save, arr=labels))
        for array, kind in ((images, "images"), (labels, "labels")):
            arrays[f"{part}_{kind}"] = {"shape": array.shape, "sha256": _content(array)}
    names = list(origin.class_names)
    digest = _sha256([names, [[key, arrays[key]["shape"], arrays[key]["sha256"]] for key in sorted(arrays)]])
    for key, entry in arrays.items():
        entry["checked"] = stamp(folder / f"{key}.npy")
    meta = {"digest": digest, "class_names": names, "mean": mean, "std": std, "arrays": arrays}
    atomic_write(folder / "meta.json", json.dumps({**meta, "sha256": _sha256(meta)}, indent=1))


def _open(source: Callable[[], Source], where: str) -> Source:
    """Open a source and check all that can be checked without decoding its images."""
    try:
        origin = source()
    except UserError:
        raise
    except Exception as error:  # a source may be anybody's code
        raise UserError(f"{where}: cannot be read ({one_line(error)})") from error
    if not isinstance(origin, Source):
        raise UserError(f"{where}: its source gave a {type(origin).__name__}; expected an aerl.data.Source")
    classes = len(origin.class_names)
    for split, table in (("train", origin.train), ("test", origin.test)):
        count, labels = len(table.images), table.labels
        if count == 0:
            raise UserError(f"{where}: the {split} split is empty")
        if labels.shape != (count,):
            raise UserError(f"{where}: the {split} split has {count} images and {len(labels)} labels")
        outside = (labels < 0) | (labels >= classes)
        if outside.any():
            row = int(outside.argmax())
            raise UserError(f"{where}: the label of {split} image {row} is {labels[row]}; expected 0 to {classes - 1}")
        absent = sorted(set(range(classes)) - set(labels.tolist()))
        if split == "train" and len(absent) == classes - 1:
            raise UserError(f"{where}: all training images are of one class; expected at least two")
        if absent:
            names = few(origin.class_names[label] for label in absent)
            log.warning("%s: the %s split has no image of %d of the %d classes (%s)", where, split,
                        len(absent), classes, names)  # fmt: skip
    return origin


def _picture(image: Any) -> Any:
    """A PIL image, of a PIL image or of an array (H, W) or (H, W, C)."""
    from PIL import Image

    if not isinstance(image, np.ndarray):
        return image
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)


def _convert(image: Any, *, size: int | None, grey: bool, lossy: bool) -> Pixels:
    """The pixels (C, H, W) of one image. Raises ValueError for deep pixels, and for colour that would be lost.

    `lossy` allows to turn colour into grey.
    """
    from PIL import Image, ImageOps

    picture = _picture(image)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits: PIL mode {picture.mode}")
    if grey and picture.mode not in GREY and not lossy:
        raise ValueError("it is in colour and the first is not: set dataset.channels to 1 or 3")
    picture = picture.convert("L" if grey else "RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _write_images(
    path: Path, images: Images, rows: Rows, convert: Callable[[Any], Pixels], shape: tuple[int, ...], where: str
) -> Pixels:
    """Write these rows as an .npy file (N, C, H, W), which is returned as a memory map."""
    written = np.lib.format.open_memmap(path, "w+", np.uint8, shape=(len(rows), *shape))
    with path.open("r+b") as file:  # a full disk is an OSError here; later it would kill the process
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def write(block: range) -> None:
        for place in block:
            row = int(rows[place])
            try:
                pixels = convert(images[row])
            except Exception as error:  # an array or PIL image of anybody's code
                raise UserError(f"{where} image {row} cannot be used ({one_line(error)})") from error
            if pixels.shape != shape:
                raise UserError(
                    f"dataset.size=null: {where} image {row} has {pixels.shape[2]}x{pixels.shape[1]} pixels and the "
                    f"first one {shape[2]}x{shape[1]}; set dataset.size to the side that all should have"
                )
            written[place] = pixels

    blocks = [range(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(write, blocks))
    written.flush()
    return written


def _mean_and_std(images: Pixels) -> tuple[list[float], list[float]]:
    """Of each channel, in [0, 1]; exact, because they come from counts of the 256 values."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for image in images:
        for channel, pixels in enumerate(image):
            counts[channel] += np.bincount(pixels.reshape(-1), minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean.tolist(), std.tolist()

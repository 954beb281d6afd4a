"""Prepared datasets: checked, split, resized, and written once as plain .npy files under `data_dir`.

    <data_dir>/prepared/<name>-<key>/{train,val,test}_{images,labels}.npy, meta.json

The key is `aerl.tracking.fingerprint` of all that decides the content, so that nothing stale is ever read. A folder
appears under its name complete or not at all. meta.json holds the SHA-256 of itself and of the arrays, which
are checked in full when their files have been touched since the last check. Starting from a prepared folder
needs neither the source nor its libraries.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch

from aerl.data.batches import ahead
from aerl.data.sources import Labels, Source, Table, few, one_line, stratified_split
from aerl.data.splits import DataSplits, Split
from aerl.runtime.files import atomic_write
from aerl.tracking.fingerprint import fingerprint, stamp
from aerl.types import UserError

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

BLOCK = 4 << 20  # bytes of images that are decoded and written at once
PARTS = ("train", "val", "test")
GREY = ("1", "L", "LA", "La")  # PIL's modes without colour

log = logging.getLogger("aerl")


@dataclass(frozen=True)
class _Recipe:
    """How a source becomes splits."""

    size: int | None
    channels: Literal[1, 3] | None
    val_fraction: float
    split_seed: int


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
    """The three splits of a dataset, from the cache where they are there already.

    `identity` says what `source` opens (its target and keyword arguments, in JSON's types); a file or folder
    named by an argument counts with what the file system notes about it. `val_fraction` of the training images, in
    (0, 1), become the validation split, stratified by class. `size` scales each image so that its shorter
    side fits and cuts out the middle, size x size; None takes them as they are. `channels` None takes what
    the first training image has. The splits are held in memory if all three together have at most
    `memory_limit` bytes; else they are memory-mapped, and pages of them are in memory while they are used.

    Raises UserError for images or labels that cannot be trained on, and when `data_dir` cannot be written.
    """
    recipe = _Recipe(size, channels, val_fraction, split_seed)
    where = f"dataset.path={identity['path']}" if identity.get("path") else f"dataset={name}"
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100]
    try:
        key = fingerprint(identity, asdict(recipe))
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({one_line(error)})") from error
    folder = Path(data_dir).expanduser() / "prepared" / f"{slug}-{key}"
    splits = _load(folder, memory_limit, logging.DEBUG)
    if splits is not None:
        return splits
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{slug}.lock"), name):
            splits = _load(folder, memory_limit)  # another process may just have finished it
            if splits is None:
                with _appearing(folder) as scratch:
                    _build(source, scratch, name, where, recipe)
                splits = _load(folder, memory_limit)
    except OSError as error:  # a fault of the source has become a UserError before it gets here
        raise UserError(f"data_dir={data_dir}: cannot hold the prepared data of {name} ({one_line(error)})") from error
    if splits is None:
        raise UserError(f"data_dir={data_dir}: {folder} is damaged and cannot be replaced; remove it")
    return splits


@contextmanager
def _alone(lock: Path, name: str) -> Iterator[None]:
    """Let one process at a time download and prepare a dataset; the others wait and find it done."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing %s: waiting for it", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # then two may prepare the same, and the first to finish wins
            log.info("%s cannot be locked (%s)", lock, one_line(error))
        yield


# --- Reading ---------------------------------------------------------------------------------------------


def _load(folder: Path, memory_limit: int, level: int = logging.WARNING) -> DataSplits | None:
    """The prepared splits, or None where there are none or they are damaged, which is logged at this level."""
    if not os.path.lexists(folder):
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("sha256") != _sha256(meta):
            raise ValueError("meta.json is not what was written")
        _check(folder, meta)
        entries = meta["arrays"]
        mapped = sum(math.prod(entries[f"{part}_images"]["shape"]) for part in PARTS) > memory_limit
        train, val, test = (_load_split(folder, part, entries, mapped) for part in PARTS)
        names, mean, std = (tuple(meta[key]) for key in ("class_names", "mean", "std"))
        return DataSplits(train, val, test, names, mean, std, meta["digest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.log(level, "the prepared data in %s is damaged (%s) and is made anew", folder, one_line(error))
        return None


def _check(folder: Path, meta: dict[str, Any]) -> None:
    """ValueError unless the arrays are those that were written. Files that nobody has touched are not read."""
    news = False
    for name, entry in meta["arrays"].items():
        path = folder / f"{name}.npy"
        began, now = time.time_ns(), stamp(path)
        if now == entry["checked"]:
            continue
        with path.open("rb") as file:
            file.seek(-entry["bytes"], os.SEEK_END)
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{path.name} is not what was written")
        entry["checked"] = _settled(now, began)
        news = news or entry["checked"] is not None
    if news:
        with contextlib.suppress(UserError):  # a folder that is read-only is checked again at every start
            _write_meta(folder, meta)


def _settled(noted: list[int], now: int) -> list[int] | None:
    """The stamp of a file that has been left alone for a second: a further write cannot have the same one."""
    _, modified, changed, _ = noted
    return noted if max(modified, changed) < now - 10**9 else None


def _load_split(folder: Path, part: str, entries: Mapping[str, Any], mapped: bool) -> Split:
    images, labels = (_load_array(folder, f"{part}_{kind}", entries, mapped) for kind in ("images", "labels"))
    return Split(torch.from_numpy(images), torch.from_numpy(labels), mapped)


def _load_array(folder: Path, name: str, entries: Mapping[str, Any], mapped: bool) -> npt.NDArray[Any]:
    """The last bytes of the file: what comes before them, the header, is for other programs."""
    path, shape, size = folder / f"{name}.npy", tuple(entries[name]["shape"]), entries[name]["bytes"]
    dtype, start = (np.uint8 if name.endswith("images") else np.int64), path.stat().st_size - size
    if mapped and dtype is np.uint8:  # copy on write: torch wants memory that may be written to
        return np.memmap(path, dtype, mode="c", offset=start, shape=shape)
    return np.fromfile(path, dtype, offset=start).reshape(shape)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    atomic_write(folder / "meta.json", json.dumps({**meta, "sha256": _sha256(meta)}, indent=1))


# --- Building --------------------------------------------------------------------------------------------


def _build(source: Callable[[], Source], folder: Path, name: str, where: str, recipe: _Recipe) -> None:
    """Open the source and write the prepared data into an empty folder."""
    origin = _open(source, where)
    _, taken = stratified_split(
        origin.train.labels,
        recipe.val_fraction,
        recipe.split_seed,
        where=f"dataset.val_fraction={recipe.val_fraction}",
    )
    in_val = np.zeros(len(origin.train.labels), dtype=bool)
    in_val[taken] = True
    form = _form(origin.train, recipe, where)
    sizes = f"{len(in_val) - len(taken):,} train, {len(taken):,} val and {len(origin.test.labels):,} test images"
    classes = f"{len(origin.class_names):,} classes ({few(origin.class_names)})"
    progress = _Progress(name, len(in_val) + len(origin.test.labels), f"{sizes} of {classes}")
    splits = (
        ("train", origin.train, {"train": ~in_val, "val": in_val}),
        ("test", origin.test, {"test": np.ones(len(origin.test.labels), dtype=bool)}),
    )
    arrays: dict[str, Any] = {}
    for split, table, parts in splits:
        writers = _write_images(table, parts, form, folder, f"{where}: {split}", progress)
        for part, mask in parts.items():
            arrays[f"{part}_images"] = writers[part].entry()
            arrays[f"{part}_labels"] = _write_labels(table.labels[mask], folder / f"{part}_labels.npy")
            if (writers[part].histogram > 0).sum(axis=1).max() == 1:
                alike = f"{where}: all pixels of the {part} images have the same value"
                if part == "train":
                    raise UserError(alike)
                log.warning(alike)
        if split == "train":
            mean, std = writers["train"].mean_and_std()
    names = list(origin.class_names)
    digest = _sha256([names, [[name, arrays[name]["shape"], arrays[name]["sha256"]] for name in sorted(arrays)]])
    for name, entry in arrays.items():
        entry["checked"] = _settled(stamp(folder / f"{name}.npy"), time.time_ns())
    meta = {"digest": digest, "class_names": names, "mean": mean, "std": std, "arrays": arrays}
    _write_meta(folder, meta)


def _open(source: Callable[[], Source], where: str) -> Source:
    """Open a source and check all that can be told without decoding its images."""
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


@dataclass(frozen=True)
class _Form:
    """What every image of a dataset becomes: uint8 of `shape` (C, H, W), which `convert` makes."""

    shape: tuple[int, ...]
    convert: Callable[[Any], Pixels]
    threads: int


def _form(table: Table, recipe: _Recipe, where: str) -> _Form:
    """The form of a dataset: what the recipe leaves open is that of its first training image."""
    try:
        first = _picture(table.images[0])
        channels = recipe.channels or (1 if first.mode in GREY else 3)
        convert = partial(_convert, size=recipe.size, channels=channels, lossy=recipe.channels is not None)
        shape = convert(first).shape
    except Exception as error:
        raise UserError(f"{where}: train image 0 cannot be used ({one_line(error)})") from error
    # PIL lets other threads run while it works on a large image; for small ones they are in the way.
    large = max(*first.size, *shape) >= 100
    return _Form(shape, convert, min(8, os.cpu_count() or 1) if large else 1)


def _picture(image: Any) -> Any:
    """A PIL image, of a PIL image or of an array (H, W) or (H, W, C)."""
    from PIL import Image

    if not isinstance(image, np.ndarray):
        return image
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _convert(image: Any, *, size: int | None, channels: int, lossy: bool) -> Pixels:
    """The pixels (C, H, W) of one image, ValueError if it has none. Colour is given up only if `lossy`."""
    from PIL import Image, ImageOps

    picture = _picture(image)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits: PIL mode {picture.mode}")
    if channels == 1 and picture.mode not in GREY and not lossy:
        raise ValueError("it is in colour and the first is not: set dataset.channels to 1 or 3")
    mode = "L" if channels == 1 else "RGB"
    if picture.mode != mode:
        picture = picture.convert(mode)
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _write_images(
    table: Table, parts: Mapping[str, Mask], form: _Form, folder: Path, where: str, progress: "_Progress"
) -> dict[str, "_Writer"]:
    """Write to each part the rows its mask has, going through the images once and in order."""
    rows = range(len(table.images))
    step = max(1, BLOCK // math.prod(form.shape))
    spans = [rows[start : start + step] for start in range(0, len(rows), step)]
    blocks = ahead(partial(_decode, table, form, where), spans, workers=form.threads)
    with ExitStack() as stack:
        writers = {
            part: _Writer(stack.enter_context(_durable(folder / f"{part}_images.npy")), int(mask.sum()), form.shape)
            for part, mask in parts.items()
        }
        for span, block in zip(spans, blocks, strict=True):
            for part, mask in parts.items():
                writers[part].append(block[mask[span.start : span.stop]])
            progress.add(len(span))
    return writers


def _decode(table: Table, form: _Form, where: str, span: range) -> Pixels:
    """The images of these rows, (N, C, H, W)."""
    block = np.empty((len(span), *form.shape), dtype=np.uint8)
    for place, row in enumerate(span):
        try:
            pixels = form.convert(table.images[row])
        except Exception as error:  # PIL and its plug-ins raise nearly everything for a damaged file
            raise UserError(f"{where} image {row} cannot be used ({one_line(error)})") from error
        if pixels.shape != form.shape:
            height, width = pixels.shape[1:]
            raise UserError(
                f"dataset.size=null: {where} image {row} has {width}x{height} pixels and the first one "
                f"{form.shape[2]}x{form.shape[1]}; set dataset.size to the side that all should have"
            )
        block[place] = pixels
    return block


class _Writer:
    """The image file of one part, written block by block and measured meanwhile.

    Plain writes: a full disk is an OSError to them, but kills a process that writes through a memory map.
    """

    def __init__(self, file: BinaryIO, count: int, shape: tuple[int, ...]) -> None:
        self.file, self.shape, self.sha256 = file, (count, *shape), hashlib.sha256()
        self.histogram = np.zeros((shape[0], 256), dtype=np.int64)  # of the values of each channel
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)

    def append(self, block: Pixels) -> None:
        self.file.write(block.data)
        self.sha256.update(block.tobytes())
        for channel, counts in enumerate(self.histogram):
            counts += np.bincount(block[:, channel].ravel(), minlength=256)

    def entry(self) -> dict[str, Any]:
        return _entry(self.shape, math.prod(self.shape), self.sha256)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of each channel, in [0, 1]; exact, for they come from counts."""
        values = np.arange(256) / 255
        share = self.histogram / self.histogram.sum(axis=1, keepdims=True)
        mean = share @ values
        std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
        return mean.tolist(), std.tolist()


def _write_labels(labels: Labels, path: Path) -> dict[str, Any]:
    with _durable(path) as file:
        np.save(file, labels)
    return _entry(labels.shape, labels.nbytes, hashlib.sha256(labels.tobytes()))


def _entry(shape: tuple[int, ...], size: int, sha256: Any) -> dict[str, Any]:
    """What meta.json says about an array; `checked` is the stamp of its file when that was read last."""
    return {"shape": list(shape), "bytes": size, "sha256": sha256.hexdigest(), "checked": None}


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file whose content is on the disk when the block has ended."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block succeeds and vanishes when it does not."""
    # What is there now is damaged, or was left by a process that was killed: we hold the lock.
    for left in (folder, *folder.parent.glob(f".{folder.name}.*")):
        if left.is_symlink() or left.is_file():
            left.unlink()
        shutil.rmtree(left, ignore_errors=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another was quicker, where locks do not work: its is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Progress:
    """A log line at the start, and one for every tenth of a preparation that takes long."""

    def __init__(self, name: str, total: int, content: str) -> None:
        self.name, self.total, self.done, self.tenths = name, total, 0, 0
        self.started = time.monotonic()
        log.info("preparing %s: %s", name, content)

    def add(self, count: int) -> None:
        self.done += count
        tenths = 10 * self.done // self.total
        if tenths > self.tenths and time.monotonic() - self.started > 5:
            log.info("preparing %s: %d %%", self.name, 10 * tenths)
        self.tenths = tenths

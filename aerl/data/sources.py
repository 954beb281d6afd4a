"""Where images come from: plain functions that a YAML file names with `_target_`, each giving a `Source`.

A source only opens the data. Splitting off validation, resizing, converting and every check of pixels and
labels is done once for all of them by `aerl.data.prepare.prepare`. To add a dataset, write a function of
keyword parameters that returns a `Source`, and a YAML file in conf/dataset whose `source._target_` names it.

`datasets`, `sklearn`, `torchvision` and PIL take a second or more to import, so each is imported where it
is used: a prepared dataset starts without them.
"""

import glob
import logging
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from aerl.tracking.fingerprint import fingerprint, is_hidden, walk
from aerl.types import UserError

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]

HELD_OUT = 0.2  # of a dataset that comes without a test split
DATASET_SEED = 42  # such a split belongs to the dataset: it must not change with the run's seed
NETWORK_TIMEOUT = 20.0  # seconds that a silent server is waited for

log = logging.getLogger("aerl")


class Images(Protocol):
    """A sequence of images, decoded when asked for: PIL images, or uint8 arrays (H, W) or (H, W, C)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Table:
    """N images and their labels, int64 (N,)."""

    images: Images
    labels: Labels


@dataclass(frozen=True)
class Source:
    """A dataset as it was published; label k means `class_names[k]`."""

    train: Table
    test: Table
    class_names: tuple[str, ...]


def digits(*, path: str | None = None) -> Source:
    """scikit-learn's 1,797 handwritten digits, greyscale 8x8, which come with its wheel.

    Their values 0..16 become 0..255, and each class gives 20 % to the test split. `path` is a parameter only
    so that a path is refused (UserError) rather than ignored.
    """
    if path is not None:
        raise UserError(
            f"dataset.path={path}: dataset=digits is built in and has none; "
            "dataset=huggingface and dataset=npz read data of your own"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    table = Table(images, bunch.target.astype(np.int64))
    return _hold_out(table, tuple(str(name) for name in bunch.target_names), "dataset=digits")


def cifar(*, variant: Literal["cifar10", "cifar100"], data_dir: str | Path, path: str | None = None) -> Source:
    """CIFAR-10 or CIFAR-100: downloaded by torchvision into `data_dir` once, or read from a copy at `path`.

    `path` may be anything on disk that `huggingface` reads, or a folder that torchvision has filled before.
    Raises UserError when the download fails or is corrupt, and when a copy has not 10 / 100 classes.
    """
    if path is None:
        return _torchvision_cifar(variant, Path(data_dir).expanduser() / "torchvision", download=True)
    place = Path(path).expanduser()
    if (place / "cifar-10-batches-py").is_dir() or (place / "cifar-100-python").is_dir():
        return _torchvision_cifar(variant, place, download=False)
    source = _assemble(_local_layout(place), f"dataset.path={path}")
    expected = 10 if variant == "cifar10" else 100
    if len(source.class_names) != expected:
        raise UserError(
            f"dataset.path={path}: has {len(source.class_names)} classes and {variant} has {expected}; "
            "dataset=huggingface reads any other set"
        )
    return source


def huggingface(
    *,
    path: str,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
) -> Source:
    """Any image classification set, from the Hugging Face hub or from disk.

    `path` is a hub name (owner/name, with `name` its configuration), a parquet file, a folder of parquet
    files, a folder written by `save_to_disk`, a folder of class folders (in split folders where it has
    these), or an .npz file. Columns are found by their type, then by the usual names. Numbered parts of a
    split (train-00000-of-00002, train.X1) are joined. The test split is the labelled one that is named test
    or else validation; where there is no second split, 20 % of the images are held out. Where more than one
    could be meant, `train_split` and `test_split` must name it. No code that comes with a dataset is ever
    run. What the `datasets` library downloads and unpacks is kept where it keeps things (HF_HOME).

    Raises UserError for a path that cannot be read, a hub that does not answer, and whatever is ambiguous.
    """
    place = Path(path).expanduser()
    columns = (image_column, label_column)
    if not place.exists():
        layout = _hub_layout(path, name, columns)
    elif name is None:
        layout = _local_layout(place, columns, named=bool(train_split or test_split))
    else:
        raise UserError(f"dataset.source.name={name}: {path} is on disk, where there are no configurations")
    return _assemble(layout, f"dataset.path={path}", train_split, test_split)


def npz(*, path: str) -> Source:
    """An .npz file with X_train, y_train, X_test, y_test, as the paper's code writes them.

    Images are uint8, (N, H, W, C) or greyscale (N, H, W); labels are whole numbers, (N,) or (N, 1).
    Raises UserError for a missing or damaged file and for arrays of any other kind.
    """
    return _assemble(_npz_layout(Path(path).expanduser()), f"dataset.path={path}", "train", "test")


def stratified_split(labels: Labels, fraction: float, seed: int, where: str) -> tuple[Rows, Rows]:
    """Rows that stay and rows that go, both ascending; about `fraction` of every class goes.

    Raises UserError, which begins with `where`, when a class has too few images to be on both sides.
    """
    from sklearn.model_selection import train_test_split

    if seed >= 1 << 32:
        raise UserError(f"dataset.split_seed={seed}: expected at most {(1 << 32) - 1}")
    try:
        stay, go = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        classes, counts = np.unique(labels, return_counts=True)
        raise UserError(
            f"{where}: cannot split {len(labels)} images of {len(classes)} classes; each side needs at least "
            f"{len(classes)} images and each class 2 (label {classes[counts.argmin()]} has {counts.min()})"
        ) from error
    return np.sort(stay), np.sort(go)


def one_line(error: BaseException) -> str:
    """What is at the bottom of a chain of exceptions, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- From splits of any origin to a Source ---------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """Images, and labels as found: whole numbers, or strings that name the class; None where there is none."""

    images: Images
    labels: npt.NDArray[Any]
    names: tuple[str, ...] | None = None  # where the dataset itself names its whole numbers

    @property
    def labelled(self) -> bool:
        """False if every label is -1, as in the test split of ImageNet on the hub, or missing."""
        if self.labels.dtype.kind == "O":
            return any(label is not None for label in self.labels)
        if self.labels.dtype.kind in "if":
            return not bool(np.all((self.labels == -1) | np.isnan(self.labels)))
        return True


@dataclass(frozen=True)
class _Layout:
    """The parts that a dataset consists of, by their own names, and what reads some of them as one split.

    `left_out` names what is not read, also what `read` finds on its way.
    """

    parts: Sequence[str]
    read: Callable[[Sequence[str]], _Split]
    left_out: list[str] = field(default_factory=list)


class _Made:
    """A sequence of images, each of which is made of its item when it is asked for."""

    def __init__(self, items: Any, make: Callable[[Any], Any]) -> None:
        self.items, self.make = items, make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> Any:
        return self.make(self.items[index])


def _assemble(layout: _Layout, where: str, train_split: str | None = None, test_split: str | None = None) -> Source:
    """Choose the two splits, number their labels, and hold out a test split where there is none."""
    groups = _grouped(layout.parts, where)

    def find(key: str, chosen: str | None, word: str, taken: Sequence[str] = ()) -> list[str]:
        """The parts of the split that the user names, or else of the one whose name has this word."""
        free = {name: parts for name, parts in groups.items() if not set(parts) & set(taken)}
        named = {part: [part] for part in layout.parts if part not in taken} | free
        if chosen in named:
            return named[chosen]
        found = [parts for name, parts in free.items() if _split_word(name) == word]
        if len(found) > 1 or (chosen and not found):
            raise UserError(_ask(key, chosen, where, free))
        return found[0] if found else []

    train_parts = find("train_split", train_split, train_split or "train")
    if not train_parts and len(groups) > 1:
        raise UserError(_ask("train_split", None, where, groups))
    train_parts = train_parts or next(iter(groups.values()))
    splits, test_parts = [layout.read(train_parts)], list[str]()
    for word in (test_split,) if test_split else ("test", "validation"):
        parts = find("test_split", test_split, word, train_parts)
        if parts and ((split := layout.read(parts)).labelled or test_split):
            splits, test_parts = [*splits, split], parts
            break
    else:
        others = [name for name in groups if not _split_word(name) and not set(groups[name]) & set(train_parts)]
        if any(layout.read(groups[name]).labelled for name in others):
            raise UserError(_ask("test_split", None, where, others))
    for key, split, parts in zip(("train", "test"), splits, (train_parts, test_parts), strict=False):
        if len(split.labels) == 0:
            raise UserError(f"{where}: the {key} split is empty; expected images in class folders or parquet files")
        if len(parts) > 1:
            log.info("%s: the %s split is %s together", where, key, few(parts))
    unused = [part for part in layout.parts if part not in (*train_parts, *test_parts)]
    if left_out := [*unused, *layout.left_out]:
        log.info("%s: left out: %s", where, few(dict.fromkeys(left_out)))
    names, tables = _number(splits, where)
    if len(tables) == 1:
        log.info("%s has no labelled test split: %.0f %% of the images are held out", where, 100 * HELD_OUT)
        return _hold_out(tables[0], names, f"{where}: has no labelled test split")
    return Source(tables[0], tables[1], names)


def _ask(key: str, chosen: str | None, where: str, names: Iterable[str]) -> str:
    return f"dataset.source.{key}={chosen or 'null'}: {where} has {few(names)}; name one"


def few(names: Iterable[str]) -> str:
    """The first of these names, and how many there are more."""
    shown = list(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8:,} more" if len(shown) > 8 else "")


_SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}
_PART = re.compile(r"(.*?)[-_. ]?(\d+)(?:-of-(\d+)(?:-[0-9a-f]{16})?)?")


def _split_word(name: str) -> str | None:
    """The split that a name speaks of, if it is exactly one; in a path, the last name that does."""
    for piece in reversed(name.split("/")):
        words = set(re.split("[^a-z]+", piece.lower()))
        found = [split for split, synonyms in _SPLIT_WORDS.items() if words & synonyms]
        if len(found) == 1:
            return found[0]
    return None


def _grouped(names: Sequence[str], where: str) -> dict[str, list[str]]:
    """Parts by what they are parts of: those in the folder of a split, or counted from 0 or 1 without a gap."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    folders = set()
    for name in names:
        folder, _, base = name.rpartition("/")
        stem, number, total = match.groups("") if (match := _PART.fullmatch(base)) else (base, "", "")
        whole = f"{folder}/{stem}".strip("/") or "all"
        if not total and not _split_word(stem) and _split_word(folder.rpartition("/")[2]):
            whole = folder
            folders.add(folder)
        found.setdefault(whole, []).append((name, number, total))
    groups: dict[str, list[str]] = {}
    for whole, parts in found.items():
        own = [name for name, _, _ in parts]
        numbers = sorted(int(number) for _, number, _ in parts if number)
        totals = {int(total) for _, _, total in parts if total}
        if totals and (len(totals) > 1 or numbers != list(range(max(totals)))):
            raise UserError(f"{where}: has {few(own)}; expected each of 0 to {max(totals) - 1} once")
        counted = len(own) > 1 and numbers in (list(range(len(own))), list(range(1, len(own) + 1)))
        groups |= {whole: own} if totals or counted or whole in folders else {name: [name] for name in own}
    return groups


def _hold_out(table: Table, names: tuple[str, ...], where: str) -> Source:
    if len(table.images) != len(table.labels):
        raise UserError(f"{where}: has {len(table.images)} images and {len(table.labels)} labels")

    def image(row: int) -> Any:
        try:
            return table.images[int(row)]
        except Exception as error:  # the row in the data is what the user can look up
            raise ValueError(f"row {row} of the data: {one_line(error)}") from None

    train, test = (
        Table(_Made(rows, image), table.labels[rows])
        for rows in stratified_split(table.labels, HELD_OUT, DATASET_SEED, where)
    )
    return Source(train, test, names)


def _number(splits: Sequence[_Split], where: str) -> tuple[tuple[str, ...], list[Table]]:
    """The class names, and the splits with labels that count them. The first split is training."""
    found = [_labels(split, where) for split in splits]
    if len({own is None for _, own in found}) > 1:
        raise UserError(f"{where}: the labels of one split are class names, those of another bare numbers")
    first, names = found[0]
    if names is None:
        names = tuple(str(number) for number in range(int(first.max(initial=-1)) + 1))
    numbers = {name: number for number, name in enumerate(names)}
    tables = []
    for split, (labels, own) in zip(splits, found, strict=True):
        if own is not None and own != names:
            odd = {*own} ^ {*names} if split.names else {*own} - {*names}
            if odd:
                raise UserError(f"{where}: training and test split have different classes: {few(sorted(odd))}")
            known = (labels >= 0) & (labels < len(own))  # any other is reported later, with its image
            labels[known] = np.array([numbers[name] for name in own])[labels[known]]
        tables.append(Table(split.images, labels))
    return names, tables


def _labels(split: _Split, where: str) -> tuple[Labels, tuple[str, ...] | None]:
    """The labels of a split as numbers, and the names that it has for them if it has any."""
    labels = split.labels
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1:
        raise UserError(f"{where}: labels have shape {labels.shape}; expected (N,) or (N, 1)")
    if labels.dtype.kind == "O":
        missing = np.array([label is None for label in labels])
        labels = labels.astype(str) if all(isinstance(label, str) for label in labels) else labels
    else:
        missing = ~np.isfinite(labels) if labels.dtype.kind == "f" else np.zeros(len(labels), dtype=bool)
    if missing.any():
        raise UserError(f"{where}: the label of image {missing.argmax()} is missing, NaN or infinite")
    if labels.dtype.kind == "U":
        names, numbers = np.unique(labels, return_inverse=True)
        return numbers.astype(np.int64), tuple(names.tolist())
    if labels.dtype.kind not in "iubf":
        raise UserError(f"{where}: labels are of type {labels.dtype}; expected whole numbers or class names")
    if labels.dtype.kind == "f" and (labels != np.trunc(labels)).any():
        raise UserError(f"{where}: labels have fractions; expected whole numbers or class names")
    return labels.astype(np.int64), split.names


# --- torchvision -----------------------------------------------------------------------------------------


def _torchvision_cifar(variant: str, root: Path, *, download: bool) -> Source:
    # The archives hold pickles. torchvision executes them only after their md5 was found to be the published
    # one, which makes this the one place where aerl lets any file's pickle be executed.
    from torchvision import datasets

    kind = datasets.CIFAR10 if variant == "cifar10" else datasets.CIFAR100
    if download:
        _fetch(kind, variant, root)
    where = f"dataset={variant}" if download else f"dataset.path={root}"
    try:
        train, test = (kind(str(root), train=part, download=download) for part in (True, False))
    except RuntimeError as error:  # what torchvision raises for a wrong md5
        raise UserError(f"{where}: the files of {variant} in {root} are incomplete or corrupt") from error
    except Exception as error:  # OSError, and the errors of tarfile and zlib
        raise UserError(f"{where}: {variant} cannot be read from {root} ({one_line(error)})") from error
    tables = [Table(part.data, np.array(part.targets, dtype=np.int64)) for part in (train, test)]
    return Source(tables[0], tables[1], tuple(train.classes))


def _fetch(kind: Any, variant: str, root: Path) -> None:
    """Download an archive of torchvision's unless it, or its content, is in `root` already.

    It arrives in a temporary folder: no part of an archive is ever found under its name.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    content = [*kind.train_list, *kind.test_list]
    if all(check_integrity(root / kind.base_folder / file, md5) for file, md5 in content):
        return
    if check_integrity(root / kind.filename, kind.tgz_md5):
        return
    log.info("downloading %s into %s", variant, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder, _impatient():
            download_url(kind.url, folder, filename=kind.filename, md5=kind.tgz_md5)
            (Path(folder) / kind.filename).replace(root / kind.filename)
    except Exception as error:  # URLError, HTTPException, time-outs, OSError, RuntimeError for a wrong md5
        wrong_md5 = isinstance(error, RuntimeError)
        raise UserError(
            f"dataset={variant}: cannot be downloaded "
            f"({'the archive is corrupt: its md5 is wrong' if wrong_md5 else one_line(error)}); "
            f"set dataset.path to a local copy, or put {kind.filename} into {root}"
        ) from error


@contextmanager
def _impatient() -> Iterator[None]:
    """torchvision's download has no time-out of its own, and would wait for a dead server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- Files and folders -----------------------------------------------------------------------------------

_Columns = tuple[str | None, str | None]  # of the images and of the labels, where the user names them


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Whatever a library raises for a file it cannot read, as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # some twenty kinds: of pyarrow, fsspec, zipfile, zlib, numpy, datasets, ...
        raise UserError(f"dataset.path={path}: cannot be read ({one_line(error)})") from error


def _local_layout(place: Path, columns: _Columns = (None, None), *, named: bool = False) -> _Layout:
    """What a dataset on disk consists of, whatever it is; `named`: the user has named its splits."""
    if not place.exists():
        raise UserError(f"dataset.path={place}: no such file or folder")
    if place.is_dir() and any((place / file).exists() for file in ("dataset_dict.json", "state.json")):
        return _table_layout(_load_from_disk(place), place, columns, _roots(place))
    if layout := _parquet_layout(place, columns):
        return layout
    for key, column in zip(("image_column", "label_column"), columns, strict=True):
        if column is not None:
            raise UserError(f"dataset.source.{key}={column}: {place} is no table and has no columns")
    if place.is_dir():
        return _folder_layout(place, named)
    if place.suffix == ".npz":
        return _npz_layout(place)
    raise UserError(f"dataset.path={place}: expected a .parquet or .npz file, or a folder")


def _parquet_layout(place: Path, columns: _Columns) -> _Layout | None:
    """Parquet files, each named by its path; None where there are none."""
    inside = [Path(entry.path) for entry in walk(place)] if place.is_dir() else []
    parquet = {file for file in inside if file.suffix == ".parquet" and not is_hidden(file.name)}
    files = {str(file.relative_to(place).with_suffix("")): file for file in inside if file in parquet}
    if place.is_file() and place.suffix == ".parquet":
        files = {"train": place}
    left_out = [str(file.relative_to(place)) for file in inside if file not in parquet]
    where = f"dataset.path={place}"

    def read(parts: Sequence[str]) -> _Split:
        table = _load_parquet(place, [files[part] for part in parts])
        return _table_split(table, where, columns, _roots(place if place.is_dir() else place.parent))

    return _Layout(list(files), read, left_out) if files else None


def _npz_layout(place: Path) -> _Layout:
    if not place.is_file():
        raise UserError(f"dataset.path={place}: no such file")
    if not zipfile.is_zipfile(place):  # numpy would take it for a pickle and advise to trust it
        raise UserError(f"dataset.path={place}: is not an .npz file, or not a complete one")
    names = ("X_train", "y_train", "X_test", "y_test")
    with _reading(place), np.load(place, allow_pickle=False) as file:
        for name in names:
            if name not in file.files:
                raise UserError(f"dataset.path={place}: has no array '{name}'; expected {', '.join(names)}")
        arrays = {name: file[name] for name in names}
        left_out = [name for name in file.files if name not in names]
    for name in ("X_train", "X_test"):
        images = arrays[name]
        if images.dtype != np.uint8:
            raise UserError(f"dataset.path={place}: {name} is {images.dtype}; expected uint8, from 0 to 255")
        if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] in (1, 3, 4)):
            raise UserError(
                f"dataset.path={place}: {name} has shape {images.shape}; expected (N, H, W, 3), "
                "(N, H, W, 1) or (N, H, W)"
            )
    splits = {part: _Split(arrays[f"X_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")}
    return _Layout(list(splits), lambda parts: splits[parts[0]], left_out)


def _open_image(file: Path | BinaryIO) -> Any:
    """The decoded PIL image, upright as its EXIF data has it."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        return ImageOps.exif_transpose(image)


def _open_file(path: Path) -> Any:
    try:
        return _open_image(path)
    except Exception as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _folder_layout(place: Path, named: bool) -> _Layout:
    """Class folders with images in them, in split folders where there are any.

    Read here and not by `datasets`, which takes splits from file names too ('cat/test_7.png') and leaves
    out the labels of some layouts without a word.
    """
    folders = _subfolders(place)
    splits = [folder for folder in folders if _subfolders(folder)]
    if not any(named or _split_word(folder.name) for folder in splits):
        splits = folders if folders and all(_split_word(folder.name) for folder in folders) else []
    parts = {folder.name: folder for folder in splits} or {"train": place}
    with os.scandir(place) as entries:
        left_out = sorted(entry.name for entry in entries if splits and entry.name not in parts)
    return _Layout(
        list(parts),
        lambda chosen: _class_folders([parts[name] for name in chosen], place, left_out),
        left_out,
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


def _class_folders(folders: Sequence[Path], place: Path, left_out: list[str]) -> _Split:
    """The images of the class folders in `folders`; a folder `images` alone is one without classes.

    The labels of such a folder are in a file beside it, as Tiny ImageNet has it, or nowhere.
    """
    from PIL import Image

    suffixes = Image.registered_extensions()
    files: list[Path] = []
    labels: list[str | None] = []
    nested: set[str] = set()
    for folder in folders:
        classes = _subfolders(folder)
        notes = folder / f"{folder.name}_annotations.txt"
        flat = [child.name for child in classes] == ["images"]
        with _reading(notes):
            lines = notes.read_text().splitlines() if flat and notes.is_file() else []
        noted = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        left_out += [str(c.relative_to(place)) for c in sorted(folder.iterdir()) if c not in (*classes, notes)]
        for child in classes:
            if len({_split_word(inner.name) for inner in _subfolders(child)} - {None}) > 1:
                raise UserError(
                    f"dataset.path={place}: {child} holds splits; expected split folders with class folders in them"
                )
            count = len(files)
            for entry in walk(child, (place, folder)):
                file = Path(entry.path)
                image = file.suffix.lower() in suffixes and not is_hidden(file.name)
                if image and (entry.is_file() or entry.is_symlink()):  # a broken link is an image that is lost
                    files.append(file)
                    labels.append(noted.get(file.name) if flat else child.name)
                    nested |= {*file.relative_to(child).parts[:-1]}
                else:
                    left_out.append(str(file.relative_to(place)))
            if len(files) == count:
                left_out.append(f"{child.relative_to(place)} (no images)")
    if nested - {"images"}:
        log.info("dataset.path=%s: class folders hold folders, too: %s", place, few(sorted(nested)))
    return _Split(_Made(files, _open_file), np.array(labels, dtype=object))


# --- Tables read by the `datasets` library ---------------------------------------------------------------


def _open_row(row: Mapping[str, Any], column: str, roots: Sequence[Path]) -> Any:
    """The image of a row that holds its bytes or the path of its file, which must be below one of `roots`.

    The first of them is the one that a path is relative to.
    """
    encoded = row[column]
    if encoded is None or encoded["bytes"] is encoded["path"] is None:
        raise ValueError("there is none")
    if encoded["bytes"] is not None:
        return _open_image(BytesIO(encoded["bytes"]))
    file = (roots[0] / encoded["path"]).resolve()
    if not any(file.is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f"{encoded['path']} is outside of the dataset's folder")
    return _open_image(file)


def _roots(folder: Path) -> list[Path]:
    """The folder of a table, and the one that its links lead to if it is in the hub's cache."""
    folder = folder.resolve()
    return [folder, *(above for above in folder.parents if above.name.startswith("datasets--"))]


def _load_parquet(place: Path, files: Sequence[Path]) -> Any:
    import datasets
    from pyarrow.parquet import read_schema

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with _reading(place):
            found = [datasets.Features.from_arrow_schema(read_schema(file)) for file in files]
            names = [{key: getattr(kind, "names", None) for key, kind in kinds.items()} for kinds in found]
            if any(other != names[0] for other in names):  # the library would take those of the first file
                raise UserError(f"dataset.path={place}: the parts of a split differ in their columns or class names")
            # Without a name of its own, the library takes a file with the old time for the old file.
            return datasets.load_dataset(
                "parquet",
                name=fingerprint({str(number): str(file.resolve()) for number, file in enumerate(files)}, {}),
                data_files=[glob.escape(str(file)) for file in files],
                split="train",
            )
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _load_from_disk(place: Path) -> Mapping[str, Any]:
    import datasets

    with _reading(place):
        table = datasets.load_from_disk(str(place))
    return table if isinstance(table, datasets.DatasetDict) else {"train": table}


def _hub_layout(path: str, name: str | None, columns: _Columns) -> _Layout:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or path.endswith((".parquet", ".npz")):
        raise UserError(f"dataset.path={path}: no such file or folder, nor a name on the hub (owner/name)")
    _knock(path)
    with _reading(path):
        import datasets
        from huggingface_hub import constants

        tables = datasets.load_dataset(path, name)
    own = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
    return _table_layout(tables, path, columns, [own, Path(datasets.config.DOWNLOADED_DATASETS_PATH)])


def _knock(path: str) -> None:
    """Ask the hub for any answer at all: its client goes on for minutes with a server that gives none."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:  # the user has said so: the client takes its own copy, or fails at once
        return
    try:
        get_session().get(f"{constants.ENDPOINT}/api/datasets/{path}", timeout=NETWORK_TIMEOUT)
    except Exception as error:
        raise UserError(
            f"dataset.path={path}: is not on disk, and the hub does not answer ({one_line(error)}); "
            "set dataset.path to a local copy, or HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error


def _table_layout(tables: Mapping[str, Any], path: str | Path, columns: _Columns, roots: Sequence[Path]) -> _Layout:
    import datasets

    def read(parts: Sequence[str]) -> _Split:
        with _reading(path):
            table = datasets.concatenate_datasets([tables[part] for part in parts])
        return _table_split(table, f"dataset.path={path}", columns, roots)

    return _Layout(list(tables), read)


def _table_split(table: Any, where: str, columns: _Columns, roots: Sequence[Path]) -> _Split:
    import datasets

    kinds: Mapping[str, Any] = table.features
    image = _pick("image_column", columns[0], kinds, datasets.Image, ("image", "img", "x"), where)
    usual = ("label", "labels", "fine_label", "y")
    label = _pick("label_column", columns[1], kinds, datasets.ClassLabel, usual, where)
    try:  # to decode the images here takes a quarter less time than in the library
        table = table.cast_column(image, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(f"dataset.source.image_column={image}: holds {kinds[image]}, no images") from error
    labels = table.select_columns([label]).with_format("arrow")[:][label].to_numpy()
    names = tuple(kinds[label].names) if isinstance(kinds[label], datasets.ClassLabel) else None
    images = _Made(table.select_columns([image]), partial(_open_row, column=image, roots=roots))
    return _Split(images, labels, names)


def _pick(key: str, chosen: str | None, kinds: Mapping[str, Any], kind: type, usual: Sequence[str], where: str) -> str:
    """The only column of this kind; among several, or where there is none, the one with a usual name."""
    if chosen is not None:
        if chosen not in kinds:
            raise UserError(f"dataset.source.{key}={chosen}: {where} has {', '.join(kinds)}")
        return chosen
    typed = [column for column in kinds if isinstance(kinds[column], kind)]
    found = typed if len(typed) == 1 else [column for column in typed or kinds if column in usual]
    if len(found) != 1:
        raise UserError(f"dataset.source.{key}=null: {where} leaves it open; name one of {', '.join(kinds)}")
    return found[0]

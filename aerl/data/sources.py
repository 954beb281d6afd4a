"""Where images come from: plain functions that a YAML file names with `_target_`, each giving a `Source`.

A source only opens the data. Splitting off validation, resizing, converting and every check of pixels and
labels is done once for all of them by `aerl.data.cache.prepare`. To add a dataset, write a function of
keyword parameters that returns a `Source`, and a YAML file in conf/dataset whose `source._target_` names it.

`datasets`, `sklearn`, `torchvision` and PIL take a second or more to import, so each is imported where it
is used: a prepared dataset starts without them.
"""

import logging
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

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


def cifar(
    *, variant: Literal["cifar10", "cifar100"], data_dir: str | Path, path: str | None = None
) -> Source:
    """CIFAR-10 or CIFAR-100: downloaded by torchvision into `data_dir` once, or read from a copy at `path`.

    `path` may be anything on disk that `huggingface` reads, or a folder that torchvision has filled before.
    Raises UserError when the download fails or is corrupt, and when a copy has not 10 / 100 classes.
    """
    if path is None:
        return _torchvision_cifar(variant, Path(data_dir).expanduser() / "torchvision", download=True)
    place = Path(path).expanduser()
    if (place / "cifar-10-batches-py").is_dir() or (place / "cifar-100-python").is_dir():
        return _torchvision_cifar(variant, place, download=False)
    source = _assemble(_local_splits(place), f"dataset.path={path}")
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
    files named by split, a folder written by `save_to_disk`, a folder of class folders (below train/ and
    test/ or val/ where it has these), or an .npz file. Columns are found by their type, then by the usual
    names. The test split is the first labelled one of test, validation, val, valid; where there is none,
    20 % of the images are held out. No code that comes with a dataset is ever run. What the `datasets`
    library downloads and unpacks is kept where it keeps things (HF_HOME).

    Raises UserError for a path that cannot be read, a hub that does not answer, and ambiguous columns.
    """
    place = Path(path).expanduser()
    columns = (image_column, label_column)
    if not place.exists():
        splits = _hub_splits(path, name, columns)
    elif name is None:
        splits = _local_splits(place, columns)
    else:
        raise UserError(f"dataset.source.name={name}: {path} is on disk, where there are no configurations")
    return _assemble(splits, f"dataset.path={path}", train_split, test_split)


def npz(*, path: str) -> Source:
    """An .npz file with X_train, y_train, X_test, y_test, as the paper's code writes them.

    Images are uint8, (N, H, W, C) or greyscale (N, H, W); labels are whole numbers, (N,) or (N, 1).
    Raises UserError for a missing or damaged file and for arrays of any other kind.
    """
    return _assemble(_npz_splits(Path(path).expanduser()), f"dataset.path={path}", "train", "test")


def stratified_split(labels: Labels, fraction: float, seed: int, where: str) -> tuple[Rows, Rows]:
    """Rows that stay and rows that go, both ascending; about `fraction` of every class goes.

    Raises UserError, which begins with `where`, when a class has too few images to be on both sides.
    """
    from sklearn.model_selection import train_test_split

    try:
        stay, go = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
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
    """Images, and labels as found: whole numbers, or strings that name the class."""

    images: Images
    labels: npt.NDArray[Any]
    names: tuple[str, ...] | None = None  # where the dataset itself names its whole numbers

    @property
    def labelled(self) -> bool:
        """False if every label is -1, as in the test split of ImageNet on the hub, or missing."""
        if self.labels.dtype.kind == "O":
            return any(label is not None for label in self.labels)
        if self.labels.dtype.kind in "if" and len(self.labels):
            return not bool(np.all((self.labels == -1) | np.isnan(self.labels)))
        return True


class _Rows:
    """Some rows of a sequence of images, which are still decoded only when asked for."""

    def __init__(self, images: Images, rows: Rows) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Any:
        row = int(self.rows[index])
        try:
            return self.images[row]
        except Exception as error:  # the row in the data is what the user can look up
            raise ValueError(f"row {row} of the data: {one_line(error)}") from None


def _assemble(
    splits: Mapping[str, _Split], where: str, train_split: str | None = None, test_split: str | None = None
) -> Source:
    """Choose the two splits, number their labels, and hold out a test split where there is none."""
    for key, split in (("train_split", train_split), ("test_split", test_split)):
        if split is not None and split not in splits:
            raise UserError(f"dataset.source.{key}={split}: {where} has {', '.join(splits)}")
    if train_split is None:
        train_split = next(iter(splits)) if len(splits) == 1 else "train"
    if train_split not in splits:
        raise UserError(f"dataset.source.train_split=null: {where} has {', '.join(splits)}; name one")
    if train_split == test_split:
        raise UserError(f"dataset.source.test_split={test_split}: is the training split; name another one")
    if test_split is None:
        others = [name for name in ("test", "validation", "val", "valid") if name != train_split]
        test_split = next((name for name in others if name in splits and splits[name].labelled), None)
    train = splits[train_split]
    test = None if test_split is None else splits[test_split]
    names, tables = _number([train] if test is None else [train, test], where)
    if test is None:
        log.info("%s has no labelled test split: %.0f %% of the images are held out", where, 100 * HELD_OUT)
        return _hold_out(tables[0], names, f"{where}: has no labelled test split")
    return Source(tables[0], tables[1], names)


def _hold_out(table: Table, names: tuple[str, ...], where: str) -> Source:
    if len(table.images) != len(table.labels):
        raise UserError(f"{where}: has {len(table.images)} images and {len(table.labels)} labels")
    train, test = (
        Table(_Rows(table.images, rows), table.labels[rows])
        for rows in stratified_split(table.labels, HELD_OUT, DATASET_SEED, where)
    )
    return Source(train, test, names)


def _number(splits: Sequence[_Split], where: str) -> tuple[tuple[str, ...], list[Table]]:
    """The class names, and the splits with labels that count them. The first split is training."""
    if splits[0].labels.dtype.kind in "OU" and all(isinstance(label, str) for label in splits[0].labels):
        names = tuple(sorted(set(splits[0].labels.tolist())))
        numbers = {name: number for number, name in enumerate(names)}
        foreign = [label for split in splits for label in split.labels.tolist() if label not in numbers]
        if foreign:
            raise UserError(f"{where}: the test split has the label '{foreign[0]}', which training has not")
        found = [np.array([numbers[label] for label in split.labels], dtype=np.int64) for split in splits]
    else:
        found = [_whole_numbers(split.labels, where) for split in splits]
        largest = max(int(labels.max(initial=-1)) for labels in found)
        names = splits[0].names or tuple(str(number) for number in range(largest + 1))
    return names, [Table(split.images, labels) for split, labels in zip(splits, found, strict=True)]


def _whole_numbers(values: npt.NDArray[Any], where: str) -> Labels:
    labels = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if labels.ndim != 1:
        raise UserError(f"{where}: labels have shape {values.shape}; expected (N,) or (N, 1)")
    if labels.dtype.kind not in "iubf":
        raise UserError(f"{where}: labels are of type {labels.dtype}; expected whole numbers or class names")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise UserError(f"{where}: the label of image {np.isnan(labels).argmax()} is missing or NaN")
    if labels.dtype.kind == "f" and (labels != np.trunc(labels)).any():
        raise UserError(f"{where}: labels have fractions; expected whole numbers or class names")
    return labels.astype(np.int64)


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

_SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val"},
}


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Whatever a library raises for a file it cannot read, as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # some twenty kinds: of pyarrow, fsspec, zipfile, zlib, numpy, datasets, ...
        raise UserError(f"dataset.path={path}: cannot be read ({one_line(error)})") from error


def _local_splits(place: Path, columns: _Columns = (None, None)) -> Mapping[str, _Split]:
    """The splits of a dataset on disk, whatever it is."""
    if not place.exists():
        raise UserError(f"dataset.path={place}: no such file or folder")
    if place.is_dir() and any((place / file).exists() for file in ("dataset_dict.json", "state.json")):
        return _table_splits(_load_from_disk(place), place, columns)
    if files := _parquet_files(place):
        return _table_splits(_load_parquet(place, files), place, columns)
    for key, column in zip(("image_column", "label_column"), columns, strict=True):
        if column is not None:
            raise UserError(f"dataset.source.{key}={column}: {place} is no table and has no columns")
    if place.is_dir():
        return _folder_splits(place)
    if place.suffix == ".npz":
        return _npz_splits(place)
    raise UserError(f"dataset.path={place}: expected a .parquet or .npz file, or a folder")


def _split_word(name: str) -> str | None:
    """The split that the name of a file or folder speaks of, if it is exactly one."""
    words = set(re.split("[^a-z]+", name.lower()))
    found = [split for split, synonyms in _SPLIT_WORDS.items() if words & synonyms]
    return found[0] if len(found) == 1 else None


def _parquet_files(place: Path) -> Mapping[str, list[str]]:
    """Parquet files by split, which is a word in the file's name or else in those of its folders."""
    if place.is_file():
        return {"train": [str(place)]} if place.suffix == ".parquet" else {}
    splits: dict[str | None, list[str]] = {}
    for file in sorted(place.rglob("*.parquet")):
        names = [file.stem, *reversed(file.relative_to(place).parent.parts)]
        split = next((word for name in names if (word := _split_word(name))), None)
        splits.setdefault(split, []).append(str(file))
    unclear = splits.pop(None, [])
    if unclear and splits:
        raise UserError(f"dataset.path={unclear[0]}: its name says neither train nor test nor validation")
    return {"train": unclear} if unclear else {str(split): files for split, files in splits.items()}


def _npz_splits(place: Path) -> Mapping[str, _Split]:
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
    for name in ("X_train", "X_test"):
        images = arrays[name]
        if images.dtype != np.uint8:
            raise UserError(f"dataset.path={place}: {name} is {images.dtype}; expected uint8, from 0 to 255")
        if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] in (1, 3, 4)):
            raise UserError(
                f"dataset.path={place}: {name} has shape {images.shape}; expected (N, H, W, 3), "
                "(N, H, W, 1) or (N, H, W)"
            )
    return {part: _Split(arrays[f"X_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")}


class _Files:
    """Image files, opened when asked for, and upright as their EXIF data has them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Any:
        try:
            return _open_image(self.paths[index])
        except Exception as error:
            raise ValueError(f"{self.paths[index]}: {one_line(error)}") from None


def _open_image(file: Path | BinaryIO) -> Any:
    """The decoded PIL image, upright as its EXIF data has it."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        return ImageOps.exif_transpose(image)


def _folder_splits(place: Path) -> Mapping[str, _Split]:
    """Class folders with images in them, below split folders where there are any.

    Read here and not by `datasets`, which takes splits from file names too ('cat/test_7.png') and leaves
    out the labels of some layouts without a word.
    """
    folders = {_split_word(folder.name): folder for folder in _subfolders(place) if _subfolders(folder)}
    folders.pop(None, None)
    splits: dict[str, _Split] = {}
    for split, folder in (folders or {"train": place}).items():
        files = _class_files(folder)
        if not files:
            raise UserError(f"dataset.path={folder}: holds no images in class folders, and no parquet files")
        splits[str(split)] = _Split(
            _Files([file for file, _ in files]), np.array([name for _, name in files])
        )
    return splits


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir())


def _class_files(folder: Path) -> list[tuple[Path, str]]:
    from PIL import Image

    suffixes = Image.registered_extensions()
    return [
        (file, child.name)
        for child in _subfolders(folder)
        for file in sorted(child.rglob("*"))
        if file.suffix.lower() in suffixes
    ]


# --- Tables read by the `datasets` library ---------------------------------------------------------------


class _Column:
    """The image column of a table whose images are encoded: {"bytes": ..., "path": ...}."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Any:
        encoded = self.table[index][self.column]
        if encoded is None:
            raise ValueError("there is none")
        content = encoded["bytes"]
        return _open_image(Path(encoded["path"]) if content is None else BytesIO(content))


def _load_parquet(place: Path, files: Mapping[str, list[str]]) -> Mapping[str, Any]:
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with _reading(place):
            tables: Mapping[str, Any] = datasets.load_dataset("parquet", data_files=dict(files))
            return tables
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _load_from_disk(place: Path) -> Mapping[str, Any]:
    import datasets

    with _reading(place):
        table = datasets.load_from_disk(str(place))
    return table if isinstance(table, datasets.DatasetDict) else {"train": table}


def _hub_splits(path: str, name: str | None, columns: _Columns) -> Mapping[str, _Split]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or path.endswith((".parquet", ".npz")):
        raise UserError(f"dataset.path={path}: no such file or folder, nor a name on the hub (owner/name)")
    _knock(path)
    with _reading(path):
        import datasets

        tables = datasets.load_dataset(path, name)
    return _table_splits(tables, path, columns)


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


def _table_splits(tables: Mapping[str, Any], path: str | Path, columns: _Columns) -> Mapping[str, _Split]:
    return {split: _table_split(table, f"dataset.path={path}", columns) for split, table in tables.items()}


def _table_split(table: Any, where: str, columns: _Columns) -> _Split:
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
    return _Split(_Column(table, image), labels, names)


def _pick(
    key: str, chosen: str | None, kinds: Mapping[str, Any], kind: type, usual: Sequence[str], where: str
) -> str:
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

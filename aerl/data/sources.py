"""Where images come from: functions that a YAML file names with `_target_`, each returning a `Source`.

A source only opens the data. `aerl.data.prepare.prepare` splits off validation, resizes, converts, and checks pixels
and labels for all of them. To add a dataset, write a function of keyword parameters that returns a `Source`, and a
YAML file in conf/dataset whose `source._target_` names it.

`datasets`, `sklearn`, `torchvision` and PIL take a second or more to import. Each is imported where it is used, so
that a prepared dataset starts without them.
"""

import glob
import logging
import re
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Subset

from aerl.tracking.inputs import is_hidden, walk
from aerl.types import UserError

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]

HELD_OUT = 0.2  # of a dataset that comes without a test split
DATASET_SEED = 42  # such a split belongs to the dataset: it must not change with the run's seed
NETWORK_TIMEOUT = 20.0  # seconds to wait for a silent server
ARRAYS = ("X_train", "y_train", "X_test", "y_test")
SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}

log = logging.getLogger("aerl")


class Images(Protocol):
    """A sequence of images, decoded when they are accessed: PIL images, or uint8 arrays (H, W) or (H, W, C)."""

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

    Their values 0..16 become 0..255, and 20 % of each class become the test split. Raises UserError for a `path`,
    which would otherwise be ignored.
    """
    if path is not None:
        raise UserError(
            f"dataset.path={path}: dataset=digits is built in and has no path; "
            "dataset=huggingface and dataset=npz read your own data"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in bunch.target_names)
    return _hold_out(Table(images, bunch.target.astype(np.int64)), names, "dataset=digits")


def cifar(*, variant: Literal["cifar10", "cifar100"], data_dir: str | Path, path: str | None = None) -> Source:
    """CIFAR-10 or CIFAR-100: downloaded by torchvision into `data_dir` once, or read from a copy at `path`.

    `path` is anything on disk that `huggingface` reads, or a folder that torchvision has filled before.
    Raises UserError if the download fails or is corrupt, or if a copy has not 10 / 100 classes.
    """
    if path is None:
        return _torchvision_cifar(variant, Path(data_dir).expanduser() / "torchvision", download=True)
    place = Path(path).expanduser()
    if (place / "cifar-10-batches-py").is_dir() or (place / "cifar-100-python").is_dir():
        return _torchvision_cifar(variant, place, download=False)
    source = _assemble(_on_disk(place), f"dataset.path={path}")
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

    `path` is a hub name (owner/name, with `name` its configuration), a parquet file, a folder of parquet files, a
    folder written by `save_to_disk`, a folder of class folders (in split folders if it has splits), or an .npz file.

    A split is named by its file or folder, without a number at the end: train-00000-of-00002 and
    train-00001-of-00002 are `train`, and so are train1 and train2. `train_split` and `test_split` name one, or
    several as `a+b`. Without them, the names must be clear: one split for training, then one for testing or else for
    validation. Of a dataset that has one split only, 20 % are held out for testing.

    Raises UserError for a path that cannot be read, a hub that does not answer, and whatever is ambiguous.
    """
    place = Path(path).expanduser()
    columns = {"image_column": image_column, "label_column": label_column}
    if not place.exists():
        parts = _on_hub(path, name, columns)
    elif name is not None:
        raise UserError(f"dataset.source.name={name}: {path} is on disk; only the hub has configurations")
    else:
        parts = _on_disk(place, columns, splits_named=bool(train_split or test_split))
    return _assemble(parts, f"dataset.path={path}", train_split, test_split)


def npz(*, path: str) -> Source:
    """An .npz file with X_train, y_train, X_test, y_test, as the paper's code writes them.

    Images are uint8, (N, H, W, C) or greyscale (N, H, W); labels are whole numbers, (N,) or (N, 1).
    Raises UserError for a missing or damaged file and for any other arrays.
    """
    place = Path(path).expanduser()
    return _assemble(_npz_parts(place), f"dataset.path={path}")


def stratified_split(labels: Labels, fraction: float, seed: int, where: str) -> tuple[Rows, Rows]:
    """Two disjoint sets of rows, both ascending; the second has about `fraction` of every class.

    Raises UserError, which begins with `where`, if a class has too few images to be on both sides.
    """
    from sklearn.model_selection import train_test_split

    if seed >= 1 << 32:
        raise UserError(f"dataset.split_seed={seed}: expected at most {(1 << 32) - 1}")
    try:
        first, second = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        classes, counts = np.unique(labels, return_counts=True)
        raise UserError(
            f"{where}: cannot split {len(labels)} images of {len(classes)} classes; each side needs at least "
            f"{len(classes)} images and each class 2 (label {classes[counts.argmin()]} has {counts.min()})"
        ) from error
    return np.sort(first), np.sort(second)


def one_line(error: BaseException) -> str:
    """The text of the first exception of a chain of causes, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def few(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    shown = list(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8:,} more" if len(shown) > 8 else "")


# --- From the parts of a dataset to a Source --------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Images, and labels as found: whole numbers, or strings that name the class."""

    images: Images
    labels: npt.NDArray[Any]
    names: tuple[str, ...] | None = None  # where the dataset itself names its whole numbers


_Parts = Mapping[str, Callable[[], _Part]]  # what a dataset consists of: files, folders or splits, and how to read each


def _assemble(parts: _Parts, where: str, train_split: str | None = None, test_split: str | None = None) -> Source:
    """Choose the two splits, number their labels, and hold out a test split if there is none."""
    groups = _groups(parts, where)
    train_parts = _choose(groups, "train_split", train_split, ("train",), where)
    if not train_parts and len(groups) > 1:
        raise _ambiguous("train_split", None, groups, where)
    train_parts = train_parts or next(iter(groups.values()))
    others = {name: group for name, group in groups.items() if not set(group) & set(train_parts)}
    test_parts = _choose(others, "test_split", test_split, ("test", "validation"), where)
    if others and not test_parts:
        raise _ambiguous("test_split", None, others, where)
    if unused := [part for part in parts if part not in (*train_parts, *test_parts)]:
        log.info("%s: left out: %s", where, few(unused))
    splits = [_read(parts, chosen, where) for chosen in (train_parts, test_parts) if chosen]
    names, tables = _number(splits, where)
    if len(tables) == 1:
        log.info("%s has no test split: %.0f %% of the images are held out", where, 100 * HELD_OUT)
        return _hold_out(tables[0], names, f"{where}: has no test split")
    return Source(tables[0], tables[1], names)


def _groups(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Parts by the split they belong to: those that differ in a count from 0 or 1 only are one split."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)[-_. /]?(\d+)(?:-of-(\d+)(?:-[0-9a-f]{16})?)?", name)
        stem, number, total = match.groups() if match else (name, -1, 0)
        found.setdefault(stem or "all", {})[name] = (int(number), int(total or 0))
    groups: dict[str, list[str]] = {}
    for stem, parts in found.items():
        numbers, totals = sorted(number for number, _ in parts.values()), {total for _, total in parts.values()}
        if totals != {0} and (len(totals) > 1 or numbers != list(range(max(totals)))):
            raise UserError(f"{where}: has {few(parts)}; expected each of 0 to {max(totals) - 1} once")
        counted = len(parts) > 1 and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[-1] + 1))
        groups |= {stem: list(parts)} if totals != {0} or counted else {name: [name] for name in parts}
    return groups


def _choose(
    groups: Mapping[str, list[str]], key: str, chosen: str | None, words: Sequence[str], where: str
) -> list[str]:
    """The parts of the split that the user names, or else of the one whose name has the first possible word."""
    if chosen is not None:
        known = {part: [part] for group in groups.values() for part in group} | dict(groups)
        if missing := [name for name in chosen.split("+") if name not in known]:
            raise _ambiguous(key, "+".join(missing), groups, where)
        return [part for name in chosen.split("+") for part in known[name]]
    for word in words:
        found = [name for name in groups if _split_word(name) == word]
        if len(found) > 1:
            raise _ambiguous(key, None, groups, where)
        if found:
            return groups[found[0]]
    return []


def _ambiguous(key: str, chosen: str | None, names: Iterable[str], where: str) -> UserError:
    return UserError(f"dataset.source.{key}={chosen or 'null'}: {where} has {few(names)}; name one, or several as a+b")


def _split_word(name: str) -> str | None:
    """Which split a name means if it means exactly one; in a path, the last component that means one."""
    for component in reversed(name.split("/")):
        words = set(re.split("[^a-z]+", component.lower()))
        found = [split for split, synonyms in SPLIT_WORDS.items() if words & synonyms]
        if len(found) == 1:
            return found[0]
    return None


def _read(parts: _Parts, chosen: Sequence[str], where: str) -> _Part:
    """Some parts as one."""
    read = [parts[name]() for name in chosen]
    if any(part.names != read[0].names for part in read):
        raise UserError(f"{where}: {few(chosen)} differ in their class names")
    if len(read) == 1:
        return read[0]
    log.info("%s: %s are one split", where, few(chosen))
    images: Any = ConcatDataset([part.images for part in read])  # type: ignore[misc]
    return _Part(images, np.concatenate([part.labels for part in read]), read[0].names)


def _number(splits: Sequence[_Part], where: str) -> tuple[tuple[str, ...], list[Table]]:
    """The class names, and the splits with labels that count them. The first split is training."""
    numbered = [_numbers(split, where) for split in splits]
    if len({own is None for _, own in numbered}) > 1:
        raise UserError(f"{where}: the labels of one split are class names, those of another bare numbers")
    first, names = numbered[0]
    if names is None:
        names = tuple(str(number) for number in range(int(first.max(initial=-1)) + 1))
    tables = []
    for split, (labels, own) in zip(splits, numbered, strict=True):
        if own is not None and own != names:
            if unknown := set(own) - set(names):
                raise UserError(f"{where}: the test split has classes that training has not: {few(sorted(unknown))}")
            known = (labels >= 0) & (labels < len(own))  # any other is reported later, with its image
            labels[known] = np.array([names.index(name) for name in own])[labels[known]]
        tables.append(Table(split.images, labels))
    return names, tables


def _numbers(split: _Part, where: str) -> tuple[Labels, tuple[str, ...] | None]:
    """The labels of a split as numbers, and the names that it has for them if it has any."""
    labels = split.labels[:, 0] if split.labels.shape[1:] == (1,) else split.labels
    if labels.ndim != 1:
        raise UserError(f"{where}: labels have shape {labels.shape}; expected (N,) or (N, 1)")
    missing = np.array([label is None or label != label for label in labels], dtype=bool)
    if missing.any():
        raise UserError(f"{where}: the label of image {missing.argmax()} is missing or NaN")
    if len(labels) and isinstance(labels[0], str):
        names, numbers = np.unique(labels.astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(names.tolist())
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int64)
    if (whole != labels).any():
        raise UserError(f"{where}: labels have fractions or are infinite; expected whole numbers or class names")
    return whole, split.names


def _hold_out(table: Table, names: tuple[str, ...], where: str) -> Source:
    if len(table.images) != len(table.labels):
        raise UserError(f"{where}: has {len(table.images)} images and {len(table.labels)} labels")
    images: Any = table.images
    train, test = (
        Table(Subset(images, rows.tolist()), table.labels[rows])
        for rows in stratified_split(table.labels, HELD_OUT, DATASET_SEED, where)
    )
    return Source(train, test, names)


# --- torchvision -----------------------------------------------------------------------------------------


def _torchvision_cifar(variant: str, root: Path, *, download: bool) -> Source:
    # The archives hold pickles. torchvision executes them only after their md5 was found to be the published
    # one, which makes this the one place where aerl lets a file's pickle be executed.
    from torchvision import datasets

    kind = datasets.CIFAR10 if variant == "cifar10" else datasets.CIFAR100
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision would wait for a silent server for ever
    try:
        train, test = (kind(str(root), train=part, download=download) for part in (True, False))
    except Exception as error:  # RuntimeError for a wrong md5, URLError, OSError, errors of tarfile and zlib
        key = f"dataset={variant}: cannot be downloaded" if download else f"dataset.path={root}: cannot be read"
        remedy = f"; set dataset.path to a local copy, or put {kind.filename} into {root}" if download else ""
        raise UserError(f"{key} ({one_line(error)}){remedy}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    tables = [Table(part.data, np.array(part.targets, dtype=np.int64)) for part in (train, test)]
    return Source(tables[0], tables[1], tuple(train.classes))


# --- Files and folders -----------------------------------------------------------------------------------

_Columns = Mapping[str, str | None]  # `image_column` and `label_column`, if the user names them
_GUESS: _Columns = {"image_column": None, "label_column": None}


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Whatever a library raises for a file it cannot read, as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # some twenty kinds: of pyarrow, fsspec, zipfile, zlib, numpy, datasets, ...
        raise UserError(f"dataset.path={path}: cannot be read ({one_line(error)})") from error


def _on_disk(place: Path, columns: _Columns = _GUESS, *, splits_named: bool = False) -> _Parts:
    """The parts of a dataset on disk, whatever its format; `splits_named`: the user has named its splits."""
    if not place.exists():
        raise UserError(f"dataset.path={place}: no such file or folder")
    if any((place / file).exists() for file in ("dataset_dict.json", "state.json")):
        import datasets

        with _reading(place):
            tables = datasets.load_from_disk(str(place))
        return _table_parts(tables if isinstance(tables, dict) else {"train": tables}, place, columns)
    files = [Path(entry.path) for entry in walk(place)] if place.is_dir() else [place]
    if parquet := [file for file in files if file.suffix == ".parquet" and not is_hidden(file.name)]:
        names = [str(file.relative_to(place).with_suffix("")) if place.is_dir() else "train" for file in parquet]
        return {name: partial(_parquet, file, columns) for name, file in zip(names, parquet, strict=True)}
    for key, column in columns.items():
        if column is not None:
            raise UserError(f"dataset.source.{key}={column}: {place} is no table and has no columns")
    if place.is_dir():
        return _folder_parts(place, splits_named)
    if place.suffix == ".npz":
        return _npz_parts(place)
    raise UserError(f"dataset.path={place}: expected a .parquet or .npz file, or a folder")


def _npz_parts(place: Path) -> _Parts:
    if not zipfile.is_zipfile(place):  # numpy would take it for a pickle and advise to trust it
        raise UserError(f"dataset.path={place}: no such file, or not a complete .npz file")
    with _reading(place), np.load(place, allow_pickle=False) as file:
        if missing := [name for name in ARRAYS if name not in file.files]:
            raise UserError(f"dataset.path={place}: has no array {missing[0]}; expected {', '.join(ARRAYS)}")
        arrays = {name: file[name] for name in ARRAYS}
    for name in ("X_train", "X_test"):
        dtype, shape = arrays[name].dtype, arrays[name].shape
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))):
            raise UserError(
                f"dataset.path={place}: {name} is {dtype} of shape {shape}; expected uint8 of shape (N, H, W, 3), "
                "(N, H, W, 1) or (N, H, W)"
            )
    return {part: partial(_Part, arrays[f"X_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")}


def _folder_parts(place: Path, splits_named: bool) -> _Parts:
    """Class folders with images in them, in split folders if there are any."""
    folders = _subfolders(place)
    splits = [folder for folder in folders if _subfolders(folder)]
    if not splits_named and not any(_split_word(folder.name) for folder in splits):
        splits = folders if all(_split_word(folder.name) for folder in folders) else []
    unused = [child.name for child in place.iterdir() if child not in (splits or folders)]
    if unused:
        log.info("dataset.path=%s: left out: %s", place, few(sorted(unused)))
    return {folder.name: partial(_class_folders, folder) for folder in splits} or {
        "train": partial(_class_folders, place)
    }


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


class _Files:
    """Images that are opened when they are accessed."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Any:
        return _open_image(self.files[index], str(self.files[index]))


def _class_folders(folder: Path) -> _Part:
    """The images directly in the subfolders, which are the classes: deeper ones could belong to another split."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    left_out: list[str] = []

    def is_image(path: str) -> bool:
        file = Path(path).relative_to(folder)
        valid = file.suffix.lower() in IMG_EXTENSIONS and len(file.parts) == 2 and not is_hidden(file.name)
        if not valid:
            left_out.append(str(file))
        return valid

    classes = [child.name for child in _subfolders(folder)]
    try:
        samples = make_dataset(folder, {name: n for n, name in enumerate(classes)}, is_valid_file=is_image)
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset.path={folder}: expected class folders with images in them ({one_line(error)})"
        ) from error
    if left_out:
        log.info("dataset.path=%s: left out: %s", folder, few(left_out))
    files, labels = zip(*samples, strict=True)
    return _Part(_Files([Path(file) for file in files]), np.array(classes)[list(labels)])


def _open_image(file: Path | BinaryIO, name: str) -> Any:
    """The decoded PIL image, upright according to its EXIF data. Raises ValueError, which begins with `name`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # PIL and its plug-ins raise nearly everything for a damaged file
        raise ValueError(f"{name}: {one_line(error)}") from None


# --- Tables read by the `datasets` library ---------------------------------------------------------------


class _Rows:
    """The images of a table. A row with the path of a file in place of bytes reads it only below one of `roots`."""

    def __init__(self, table: Any, column: str, roots: Sequence[Path]) -> None:
        self.table, self.column, self.roots = table, column, roots

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int, /) -> Any:
        encoded = self.table[row][self.column] or {"bytes": None, "path": None}
        if encoded["bytes"] is not None:
            return _open_image(BytesIO(encoded["bytes"]), f"row {row}")
        file = Path(encoded["path"] or "").resolve()
        if not any(file.is_relative_to(root.resolve()) for root in self.roots):
            raise ValueError(f"row {row}: holds no image, only the path {encoded['path']}")
        return _open_image(file, f"row {row}")


def _parquet(file: Path, columns: _Columns) -> _Part:
    import datasets

    with _reading(file):
        table = datasets.load_dataset(
            "parquet",
            data_files={"train": [glob.escape(str(file))]},
            split="train",
            download_mode="force_redownload",  # or the library could take the copy of an older file for this one
        )
    return _table_part(table, file, columns)


def _on_hub(path: str, name: str | None, columns: _Columns) -> _Parts:
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        try:  # load_dataset waits for minutes for a server that does not answer
            HfApi().dataset_info(path, timeout=NETWORK_TIMEOUT)
        except Exception as error:
            raise UserError(
                f"dataset.path={path}: is not on disk, and the hub does not have it or does not answer "
                f"({one_line(error)}); set dataset.path to a local copy, or HF_HUB_OFFLINE=1 to use what was downloaded"
            ) from error
    import datasets

    with _reading(path):
        tables = datasets.load_dataset(path, name)
    own = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
    return _table_parts(tables, path, columns, (own, Path(datasets.config.DOWNLOADED_DATASETS_PATH)))


def _table_parts(tables: Mapping[str, Any], where: str | Path, columns: _Columns, roots: Sequence[Path] = ()) -> _Parts:
    return {name: partial(_table_part, table, where, columns, roots) for name, table in tables.items()}


def _table_part(table: Any, where: str | Path, columns: _Columns, roots: Sequence[Path] = ()) -> _Part:
    import datasets

    image = _column("image_column", columns, table.features, datasets.Image, ("image", "img", "x"), where)
    usual = ("label", "labels", "fine_label", "y")
    label = _column("label_column", columns, table.features, datasets.ClassLabel, usual, where)
    try:
        images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(f"dataset.source.image_column={image}: holds {table.features[image]}, no images") from error
    labels = table.select_columns([label]).with_format("arrow")[:][label].to_numpy()
    names = getattr(table.features[label], "names", None)
    return _Part(_Rows(images, image, roots), labels, tuple(names) if names else None)


def _column(
    key: str, columns: _Columns, features: Mapping[str, Any], kind: type, usual: Sequence[str], where: str | Path
) -> str:
    """The column that the user names, or the only one of this type; else the only one with a usual name."""
    typed = [column for column in features if isinstance(features[column], kind)]
    found = typed if len(typed) == 1 else [column for column in typed or features if column in usual]
    chosen = columns[key] or (found[0] if len(found) == 1 else None)
    if chosen not in features:
        raise UserError(f"dataset.source.{key}={columns[key] or 'null'}: {where} has {', '.join(features)}; name one")
    return str(chosen)

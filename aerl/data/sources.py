"""Where images come from: functions that a YAML file names with `_target_`, each returning a `Source`.

A source only opens the data; `aerl.data.prepare` splits, resizes, converts and checks it, and names the dataset in
errors. What takes long to import is imported where it is used: a prepared dataset starts without it.
"""

import glob
import logging
import re
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from torch.utils.data import ConcatDataset

from aerl.errors import UserError, first_line
from aerl.tracking.inputs import is_hidden, walk

NETWORK_TIMEOUT = 20.0  # seconds to wait for a silent server
SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}

log = logging.getLogger("aerl")


@dataclass(frozen=True)
class Table:
    """N images and their labels.

    `images` is a sequence of PIL images or uint8 arrays, (H, W) or (H, W, C), which may decode them on access. `labels`
    is a sequence of whole numbers or of class names, or a pandas Series of them.
    """

    images: Any
    labels: Any


@dataclass(frozen=True)
class Source:
    """A dataset as it was published; the label k means `class_names[k]`.

    Without a test split 20 % of the images are held out; without names the classes are those of the training labels.
    """

    train: Table
    test: Table | None = None
    class_names: tuple[str, ...] | None = None
    test_only: bool = False


def digits(*, path: str | None = None) -> Source:
    """scikit-learn's 1,797 handwritten digits, greyscale 8x8, without a test split."""
    if path is not None:
        raise UserError(f"dataset.path={path}: must be null for dataset=digits; your data: dataset=huggingface or npz")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Source(Table(np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target))  # from 0..16 to 0..255


def cifar(*, variant: Literal["cifar10", "cifar100"], data_dir: str | Path, path: str | None = None) -> Source:
    """CIFAR-10 or CIFAR-100: downloaded by torchvision into `data_dir`, or read from a copy at `path`.

    `path` is a folder that torchvision has filled, or anything that `huggingface` reads.
    """
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[variant]
    root = Path(path or f"{data_dir}/torchvision").expanduser()
    if path is not None and not (root / kind.base_folder).is_dir():
        source = huggingface(path=path)
        if (classes := len(np.unique(source.train.labels))) != int(variant.removeprefix("cifar")):
            raise UserError(f"dataset.path={path}: has {classes} classes and is not {variant}; use dataset=huggingface")
        return source
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision would wait for a silent server for ever
    remedy = f"; set dataset.path to a local copy, or put {kind.filename} into {root}"
    try:
        # The archives hold pickles. torchvision executes them only if their md5 is the published one: this is the
        # one place where aerl lets a file's pickle be executed.
        with reading(f"dataset={variant}: cannot be {'read' if path else 'downloaded'}", remedy):
            train, test = (kind(str(root), train=part, download=path is None) for part in (True, False))
    finally:
        socket.setdefaulttimeout(timeout)
    return Source(Table(train.data, train.targets), Table(test.data, test.targets), tuple(train.classes))


def npz(*, path: str) -> Source:
    """An .npz file with X_train, y_train, X_test, y_test, as the paper's code writes them.

    Images are uint8, (N, H, W, C) or greyscale (N, H, W); labels are whole numbers, (N,) or (N, 1). With X_test and
    y_test alone it evaluates a trained model.
    """
    place = Path(path).expanduser()
    if not zipfile.is_zipfile(place):  # numpy would take it for a pickle
        raise UserError(f"dataset.path={place}: no such file, or not a complete .npz file")
    with np.load(place, allow_pickle=False) as file:
        test_only = not {"X_train", "y_train"} & set(file.files)
        parts = ["test"] if test_only else ["train", "test"]
        tables = [Table(file[f"X_{part}"], file[f"y_{part}"].reshape(-1)) for part in parts]
    return Source(tables[0], tables[-1], test_only=test_only)


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
    A split is named by its file or folder; the test split is the labelled one named test or else validation, if any.
    Raises UserError if more than one split could be meant.
    """
    place = Path(path).expanduser()
    if place.suffix == ".npz":
        return npz(path=path)
    table = partial(_table, image_column=image_column, label_column=label_column)
    if not place.exists():
        parts = _hub(path, name, table)
    elif name is not None:
        raise UserError(f"dataset.source.name={name}: must be null for data on disk ({path})")
    elif (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        import datasets

        saved = datasets.load_from_disk(str(place))
        splits = saved if isinstance(saved, dict) else {"train": saved}
        parts = {split: partial(table, rows) for split, rows in splits.items()}
    else:
        parts = _parquet(place, table) or _folders(place, named=bool(train_split or test_split))
    return _choose_splits(parts, train_split, test_split)


@contextmanager
def reading(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a library raises for data that it cannot read into a UserError, `what (reason)remedy`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # some twenty kinds: of PIL, pyarrow, fsspec, zipfile, zlib, numpy, datasets, ...
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{what} ({first_line(cause)}){remedy}") from error


def few(names: Iterable[object]) -> str:
    """The first of these names, and how many more there are."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8:,} more" if len(shown) > 8 else "")


# --- The splits of a dataset ---------------------------------------------------------------------------------

_Parts = Mapping[str, Callable[[], Table]]  # files, folders or splits by name, and how to read each


def _choose_splits(parts: _Parts, train_split: str | None, test_split: str | None) -> Source:
    train = _choose(parts, "train_split", train_split, "train")
    if not train and len({_stem(name) for name in parts}) > 1:
        raise UserError(f"dataset.source.train_split=null: choose one of {few(parts)}")
    train = train or list(parts)
    others = [name for name in parts if name not in train]
    for word in ("test", "validation"):
        if test := _choose(others, "test_split", test_split, word):
            table = _join(parts, test)
            if test_split or not (table.labels.isna() | (table.labels == -1)).all():
                if unused := [name for name in others if name not in test]:
                    log.info("left out: %s", few(unused))
                return Source(_join(parts, train), table)
    if unknown := [name for name in others if _word(name) is None]:
        raise UserError(f"dataset.source.test_split=null: choose one of {few(unknown)}")
    if others:
        log.info("left out, because they have no labels: %s", few(others))
    return Source(_join(parts, train))


def _choose(names: Iterable[str], key: str, chosen: str | None, word: str) -> list[str]:
    """The parts of the split that the user has chosen or, if none, of the only one with this word in its name."""
    found = [name for name in names if chosen in (name, _stem(name))]
    found = found or [name for name in names if _word(name) == (chosen or word)]
    if len({_stem(name) for name in found}) > 1 or (chosen and not found):
        raise UserError(f"dataset.source.{key}={chosen or 'null'}: choose one of {few(found or names)}")
    totals = {int(total) for name in found for total in re.findall(r"\d+-of-(\d+)", name)}
    if totals and totals != {len(found)}:
        raise ValueError(f"found {few(found)}; expected {max(totals)} files")
    return found


def _stem(name: str) -> str:
    """The name of a split without the number of a part: train for train-00000-of-00002, train1 and train/0."""
    return re.sub(r"[-_. /]?\d+(-of-\d+(-[0-9a-f]{16})?)?$", "", name)


def _word(name: str) -> str | None:
    """Which split a name means if it means exactly one; in a path, the last component that means one."""
    for component in reversed(name.split("/")):
        words = set(re.split("[^a-z]+", component.lower()))
        found = [split for split, synonyms in SPLIT_WORDS.items() if words & synonyms]
        if len(found) == 1:
            return found[0]
    return None


def _join(parts: _Parts, names: list[str]) -> Table:
    import pandas as pd

    tables = [parts[name]() for name in names]
    if len(tables) == 1:
        return tables[0]
    log.info("%s are one split", few(names))
    labels = pd.concat([table.labels for table in tables], ignore_index=True)
    return Table(ConcatDataset([table.images for table in tables]), labels)


# --- Class folders, and tables of the `datasets` library -----------------------------------------------------


@dataclass(frozen=True)
class _Images:
    """Images that are opened when they are accessed."""

    count: int
    open_image: Callable[[int], Any]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Any:
        return self.open_image(index)


def _open_image(file: Path | BinaryIO, name: str) -> Any:
    """The decoded PIL image, upright according to its EXIF data."""
    from PIL import Image, ImageOps

    with reading(f"{name} cannot be read"), Image.open(file) as image:
        return ImageOps.exif_transpose(image)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


def _folders(place: Path, named: bool) -> _Parts:
    """Class folders, in split folders if the user has `named` splits or the folders' names show it."""
    if not place.is_dir():
        raise ValueError("expected a .parquet or .npz file, or a folder")
    folders = _subfolders(place)
    splits = [folder for folder in folders if _word(folder.name) or _subfolders(folder)]
    words = [_word(folder.name) for folder in folders]
    if splits and (named or all(words) or any(_word(folder.name) and _subfolders(folder) for folder in splits)):
        return {folder.name: partial(_class_folders, folder) for folder in splits}
    return {"train": partial(_class_folders, place)}


def _class_folders(folder: Path) -> Table:
    """Images in CLASS/ or CLASS/images/; or in images/, with their classes in FOLDER_annotations.txt or nowhere.

    The last two are the layouts of Tiny ImageNet. Deeper images could belong to another split and are left out.
    """
    import pandas as pd
    from torchvision.datasets.folder import IMG_EXTENSIONS

    notes = folder / f"{folder.name}_annotations.txt"
    flat = [child.name for child in _subfolders(folder)] == ["images"]
    lines = notes.read_text().splitlines() if flat and notes.is_file() else []
    noted = dict(line.split("\t")[:2] for line in lines)
    files, labels, left_out = [], [], []
    for file in (Path(entry.path) for entry in walk(folder)):
        inside = file.parent.relative_to(folder).parts
        is_image = file.suffix.lower() in IMG_EXTENSIONS and not is_hidden(file.name)
        if is_image and inside and inside[1:] in ((), ("images",)):
            files.append(file)
            labels.append(noted.get(file.name) if flat else inside[0])
        elif file != notes:
            left_out.append(file.relative_to(folder))
    if left_out:
        log.info("left out: %s", few(left_out))
    if not files:
        raise ValueError(f"{folder} has no class folders with images in them")
    return Table(_Images(len(files), lambda n: _open_image(files[n], str(files[n]))), pd.Series(labels))


def _parquet(place: Path, table: Callable[[Any], Table]) -> _Parts:
    """Parquet files, each named by its path; none if there are none."""

    def read(file: Path) -> Table:
        import datasets

        files, mode = {"train": [glob.escape(str(file))]}, "force_redownload"  # never the copy of an older file
        return table(datasets.load_dataset("parquet", data_files=files, split="train", download_mode=mode))

    if place.suffix == ".parquet" and place.is_file():
        return {"train": partial(read, place)}
    files = (Path(entry.path) for entry in walk(place) if not is_hidden(entry.name)) if place.is_dir() else ()
    found = [file.relative_to(place) for file in files if file.suffix == ".parquet"]
    return {str(file.with_suffix("")): partial(read, place / file) for file in found}


def _hub(path: str, name: str | None, table: Callable[[Any], Table]) -> _Parts:
    import datasets
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:  # load_dataset waits for minutes for a server that does not answer
        with reading(
            f"dataset.path={path}: is not on disk, and the hub does not have it or does not answer",
            "; set dataset.path to a local copy, or HF_HUB_OFFLINE=1 to use what was downloaded",
        ):
            HfApi().dataset_info(path, timeout=NETWORK_TIMEOUT)
    return {split: partial(table, rows) for split, rows in datasets.load_dataset(path, name).items()}


def _table(table: Any, *, image_column: str | None, label_column: str | None) -> Table:
    """The images and labels of a table. A path in place of an image may only lead into the library's own caches."""
    import datasets
    import pandas as pd
    from huggingface_hub import constants

    image = _column("image_column", image_column, table.features, datasets.Image, {"image", "img", "x"})
    usual = {"label", "labels", "fine_label", "y"}
    label = _column("label_column", label_column, table.features, datasets.ClassLabel, usual)
    with reading(f"dataset.source.image_column={image}: has no images"):
        images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    caches = [Path(constants.HF_HUB_CACHE).resolve(), Path(datasets.config.DOWNLOADED_DATASETS_PATH).resolve()]

    def open_row(row: int) -> Any:
        encoded = images[row][image] or {"bytes": None, "path": None}
        if encoded["bytes"] is not None:
            return _open_image(BytesIO(encoded["bytes"]), f"dataset.source.image_column={image}: row {row}")
        file = Path(encoded["path"] or "").resolve()
        if not any(map(file.is_relative_to, caches)):
            raise ValueError(f"row {row} has no image, only the path {encoded['path']}")
        return _open_image(file, str(file))

    labels = table.select_columns([label]).with_format("arrow")[:][label].to_pandas()
    if names := getattr(table.features[label], "names", None):  # -1, for an image without a label, becomes NaN
        labels = pd.Series(pd.Categorical(labels.map(dict(enumerate(names))), categories=names))
    return Table(_Images(len(images), open_row), labels)


def _column(key: str, chosen: str | None, features: Mapping[str, Any], kind: type, usual: set[str]) -> str:
    """The column that the user names, or the only one of this type; else the only one with a usual name."""
    typed = [column for column in features if isinstance(features[column], kind)]
    found = typed if len(typed) == 1 else [column for column in typed or features if column in usual]
    column = chosen or (found[0] if len(found) == 1 else None)
    if column not in features:
        raise UserError(f"dataset.source.{key}={chosen or 'null'}: choose one of {', '.join(features)}")
    return str(column)

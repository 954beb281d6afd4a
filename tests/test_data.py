"""Sources, cache and batches, on files of every kind: whole, odd and broken. Nothing is downloaded."""

import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from aerl.data import Batches, DataSplits, Source, Split, Table, limit_training, prepare, sources, to_unit
from aerl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
needs_real_images = pytest.mark.skipif(not REAL.is_dir(), reason="no folder ../shared/data with real images")


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` unpacks into this test's folder, and no name is ever looked up on a real hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "unpacked")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def ready(data_dir: Path, source: Callable[[], Source], **settings: Any) -> DataSplits:
    """`prepare` with usual settings; the identity is the arguments of a partial."""
    arguments = dict(source.keywords) if isinstance(source, partial) else {}
    arguments.pop("data_dir", None)  # where downloads go, which does not change what they are
    usual = {"name": "set", "size": None, "channels": None, "val_fraction": 0.1, "split_seed": 42}
    return prepare(source, identity=arguments, data_dir=data_dir, **{**usual, **settings})


def refusal(action: Callable[[], Any], *words: Any) -> str:
    """The one line in which `action` is refused; `words` are in it."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if str(word) not in message] == [], message
    return message


def pictures(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def in_memory(images: Any, labels: Any, test: Any = None, classes: int = 2) -> Callable[[], Source]:
    """A source of these training images, and of the same for testing unless `test` has others."""
    table = Table(images, np.asarray(labels, dtype=np.int64))
    names = tuple(f"class {number}" for number in range(classes))
    return lambda: Source(table, test or table, names)


def rows(split: Split) -> set[tuple[bytes, int]]:
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def read(path: Any, **settings: Any) -> Callable[[], Source]:
    return partial(sources.huggingface, path=str(path), **settings)


def images_of(count: int, seed: int = 0) -> list[bytes]:
    """`pictures` as they are prepared."""
    return [image.transpose(2, 0, 1).tobytes() for image in pictures(count, 6, 6, 3, seed=seed)]


def pixels_of(*splits: Split) -> list[bytes]:
    return sorted(image.numpy().tobytes() for split in splits for image in split.images)


def prepared_folders(data_dir: Path) -> list[str]:
    """All there is in the cache, but for its locks."""
    return sorted(path.name for path in (data_dir / "prepared").iterdir() if path.suffix != ".lock")


HALVES = [0, 1] * 10  # labels of twenty images


# --- digits ----------------------------------------------------------------------------------------------


def test_digits_are_all_there_in_three_disjoint_stratified_splits(tmp_path: Path) -> None:
    data = ready(tmp_path, sources.digits)
    assert (len(data.train), len(data.val), len(data.test)) == (1293, 144, 360)
    assert data.class_names == tuple("0123456789")
    assert data.image_shape == (1, 8, 8)
    bunch = load_digits()
    expected = {
        (np.round(image * 15.9375).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    assert rows(data.train) | rows(data.val) | rows(data.test) == expected
    for split in (data.train, data.val, data.test):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.images.is_contiguous()
        share = torch.bincount(split.labels) / len(split)
        assert (share - 0.1).abs().max() < 0.02
    assert data.test.images.max() == 255


def test_mean_and_std_are_those_of_the_training_images(tmp_path: Path) -> None:
    images = pictures(200, 6, 5, 3) // np.array([1, 2, 4], dtype=np.uint8)
    data = ready(tmp_path, in_memory(images, np.arange(200) % 2))
    unit = to_unit(data.train.images).double()
    assert data.mean == pytest.approx(unit.mean(dim=(0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(unit.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_the_validation_split_depends_on_its_own_seed_and_fraction_alone(tmp_path: Path) -> None:
    first, again, other, half = (
        ready(tmp_path / str(number), sources.digits, split_seed=seed, val_fraction=fraction)
        for number, (seed, fraction) in enumerate([(42, 0.1), (42, 0.1), (0, 0.1), (42, 0.5)])
    )
    assert torch.equal(first.val.images, again.val.images)
    assert rows(first.val) != rows(other.val)
    assert torch.equal(first.test.images, other.test.images)
    assert len(half.val) == 719


# --- What becomes of the images --------------------------------------------------------------------------


def test_resizing_fits_the_shorter_side_and_keeps_the_middle(tmp_path: Path) -> None:
    images = [Image.fromarray(pixels) for pixels in (*pictures(10, 40, 30, 3), *pictures(10, 17, 91, 3))]
    data = ready(tmp_path, in_memory(images, HALVES), size=16)
    assert data.image_shape == (3, 16, 16)
    expected = {
        np.asarray(ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1).tobytes()
        for image in images
    }
    assert {content for content, _ in rows(data.test)} == expected
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = pictures(1, 10, 10, 3)[0] // 2 + 100  # the middle third is all that is left
    data = ready(tmp_path, in_memory([wide] * 20, HALVES), name="wide", size=10)
    assert data.test.images.min() >= 100


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (13, 7), (13, 7, 3), (1, 1, 3)])
def test_any_shape_of_array_is_taken_as_it_is(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = pictures(20, *shape)
    data = ready(tmp_path, in_memory(images, HALVES))
    expected = images.reshape(20, *shape[:2], -1).transpose(0, 3, 1, 2)
    assert np.array_equal(data.test.images.numpy(), expected)


@pytest.mark.parametrize(
    ("mode", "channels", "expected"),
    [
        *((grey, None, 1) for grey in ("1", "L", "LA")),
        *((colour, None, 3) for colour in ("RGB", "P", "RGBA", "CMYK")),
        *(("L", 3, 3), ("RGB", 1, 1)),
    ],
)
def test_channels_are_those_of_the_first_image_or_those_asked_for(
    tmp_path: Path, mode: str, channels: Any, expected: int
) -> None:
    images = [Image.fromarray(pixels).convert(mode) for pixels in pictures(20, 5, 5, 3)]
    data = ready(tmp_path, in_memory(images, HALVES), channels=channels)
    wanted = images[0].convert("L" if expected == 1 else "RGB")
    assert data.image_shape == (expected, 5, 5)
    assert len(data.mean) == len(data.std) == expected
    assert np.array_equal(data.test.images[0].numpy().transpose(1, 2, 0).squeeze(), np.asarray(wanted))


COLOUR = [Image.fromarray(pixels) for pixels in pictures(20, 4, 4, 3)]


@pytest.mark.parametrize(
    ("images", "words", "settings", "shape"),
    [
        ([*pictures(10, 8, 9, 3), *pictures(10, 8, 8, 3)], ["(3, 8, 8)", "dataset.size"], {"size": 8}, (3, 8, 8)),
        ([COLOUR[0].convert("L"), *COLOUR[1:]], ["image 1 ", "dataset.channels to 1 or 3"], {"channels": 3}, (3, 4, 4)),
        ([COLOUR[0].convert("L"), *COLOUR[1:]], ["image 1 ", "dataset.channels to 1 or 3"], {"channels": 1}, (1, 4, 4)),
        ([Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))] * 20, ["more than 8 bits", "I;16"], None, None),
    ],
)  # fmt: skip
def test_images_that_differ_are_made_alike_only_when_asked_for(
    tmp_path: Path, images: Any, words: list[str], settings: Any, shape: Any
) -> None:
    source = in_memory(images, HALVES)
    refusal(lambda: ready(tmp_path, source), "dataset=set: train image ", *words)
    assert prepared_folders(tmp_path) == []
    assert settings is None or ready(tmp_path, source, **settings).image_shape == shape


# --- What is refused -------------------------------------------------------------------------------------

PLAIN = pictures(20, 4, 4, 3)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (in_memory(PLAIN[:0], []), "train split has 0 images"),
        (in_memory(PLAIN, HALVES, test=Table(PLAIN[:0], np.zeros(0, dtype=np.int64))), "test split has 0 images"),
        (in_memory(PLAIN, HALVES[1:]), "the train split has 20 images and 19 labels"),
        (in_memory(PLAIN, [0] * 20), "all training images are of one class"),
        (in_memory(PLAIN, [0, 2] * 10), "the label of train image 1 is 2; expected one of 0, 1"),
        (in_memory(PLAIN, [0, 1, -1, 1] * 5), "the label of train image 2 is -1; expected one of 0, 1"),
        (in_memory(PLAIN, [0] * 19 + [1]), "dataset.val_fraction=0.1: cannot split 20 images"),
        (in_memory(PLAIN[:4], HALVES[:4]), "dataset.val_fraction=0.1: cannot split 4 images"),
        (in_memory(PLAIN * 0 + 7, HALVES), "all pixels of the train images have the same value"),
        (lambda: None, "the source returned a NoneType"),
        (lambda: {}["no"], "dataset=set: cannot be used ('no')"),
        (lambda: Path("nowhere").read_text(), "dataset=set: cannot be used ([Errno 2]"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path, source: Callable[[], Source], words: str) -> None:
    refusal(lambda: ready(tmp_path, source), words)
    assert prepared_folders(tmp_path) == []


def test_settings_that_make_no_sense_are_refused_or_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusal(lambda: ready(tmp_path, sources.digits, split_seed=5 * 10**9), "5000000000")
    data = ready(tmp_path, sources.digits)
    refusal(lambda: limit_training(data, 1294), "dataset.train_samples=1294", "1293")
    refusal(lambda: limit_training(data, 1), "dataset.train_samples=1", "one class")
    assert caplog.text == "" and limit_training(data, None) is data
    assert len(limit_training(data, 5).train) == 5
    assert "dataset.train_samples=5: " in caplog.text and "of 10 classes" in caplog.text


# --- .npz ------------------------------------------------------------------------------------------------


def write_npz(path: Path, **changes: Any) -> Path:
    arrays = {
        "X_train": pictures(40, 6, 6, 3),
        "y_train": np.arange(40) % 4,
        "X_test": pictures(8, 6, 6, 3, seed=1),
        "y_test": np.arange(8) % 4,
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


FOUR = np.arange(40) % 4


@pytest.mark.parametrize("labels", [FOUR, FOUR[:, None], FOUR.astype(float)])
@pytest.mark.parametrize("shape", [(6, 6, 3), (6, 6, 1), (6, 6)])
def test_npz_files_of_the_paper_are_read(tmp_path: Path, labels: np.ndarray, shape: tuple[int, ...]) -> None:
    images, test = pictures(40, *shape), pictures(8, *shape, seed=1)
    file = write_npz(tmp_path / "a.npz", X_train=images, X_test=test, y_train=labels)
    data = ready(tmp_path, partial(sources.npz, path=str(file)))
    assert data.class_names == ("0", "1", "2", "3")
    assert data.train.labels.shape == (36,)
    assert np.array_equal(data.test.images.numpy(), test.reshape(8, 6, 6, -1).transpose(0, 3, 1, 2))


def test_an_npz_of_test_images_alone_is_for_evaluation(tmp_path: Path) -> None:
    test = pictures(8, 6, 6)
    np.savez(tmp_path / "a.npz", X_test=test, y_test=np.arange(8) % 3)
    data = ready(tmp_path, partial(sources.npz, path=str(tmp_path / "a.npz")))
    assert data.test_only and np.array_equal(data.test.images.numpy(), test[:, None])
    assert ready(tmp_path, partial(sources.npz, path=str(tmp_path / "a.npz"))).test_only  # from the cache


class Trap:
    """Pickled, it would make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"X_test": None}, "X_test"),
        ({"X_train": np.ones((40, 6, 6, 3))}, "<f8"),
        ({"X_test": pictures(8, 3, 6, 6)}, "(1, 1, 6)"),
        ({"y_train": np.full(40, np.nan)}, "NaN"),
        ({"y_train": np.array([0, 1, 2, np.inf] * 10)}, "infinity"),
        ({"y_train": np.full(40, 0.5)}, "the label of train image 0 is 0.5"),
        ({"y_train": np.eye(4)[FOUR]}, "40 images and 160 labels"),
        ({"y_test": np.arange(8)}, "the label of test image 4 is 4; expected one of 0, 1, 2, 3"),
    ],
)
def test_other_npz_files_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = write_npz(tmp_path / "a.npz", **changes)
    refusal(lambda: ready(tmp_path, partial(sources.npz, path=str(file))), f"dataset.path={file}: ", words)


def test_a_damaged_npz_is_refused_and_no_pickle_is_executed(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "a.npz", y_train=np.array([Trap(tmp_path / "sprung")], dtype=object))
    refusal(lambda: ready(tmp_path, partial(sources.npz, path=str(file))), f"dataset.path={file}: ")
    whole = write_npz(file).read_bytes()
    for content in (
        pickle.dumps(Trap(tmp_path / "sprung")),
        whole[: len(whole) // 2],
        whole[:1000] + bytes(500) + whole[1500:],
    ):
        file.write_bytes(content)
        refusal(lambda: ready(tmp_path, partial(sources.npz, path=str(file))), f"dataset.path={file}: ")
    assert not (tmp_path / "sprung").exists()


# --- Parquet, save_to_disk, folders ----------------------------------------------------------------------

NAMES = ["ant", "bee", "cat"]
STRING = datasets.Value("string")


def table(count: int, seed: int = 0, labels: Any = None, names: Any = NAMES, kind: Any = None) -> Any:
    """A table of PNG images of ants, bees and cats in turn, with a ClassLabel column unless `kind` is given.

    `labels` are those of the three, or of all rows; `names` the class names in the order of their numbers.
    """
    images = [{"bytes": encoded(pixels), "path": None} for pixels in pictures(count, 6, 6, 3, seed=seed)]
    features = {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=list(names))}
    labels = [names.index(name) for name in NAMES] if labels is None else labels
    content = {"image": images, "label": [labels[row % len(labels)] for row in range(count)]}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def named(split: Split, names: Any) -> dict[bytes, str]:
    """The class of each image by its name."""
    return {content: names[label] for content, label in rows(split)}


WORDS = {"kind": STRING, "labels": NAMES}  # of a table whose labels are strings


@pytest.mark.parametrize(
    ("files", "settings", "sizes", "reported"),
    [
        ({"data/train-00000-of-00002": {}, "data/train-00001-of-00002": {}, "x_Validation": {}}, {}, (60, 30),
         "data/train-00000-of-00002, data/train-00001-of-00002"),
        ({"train": {}, "validation": {}, "test": {}, "readme": {}}, {}, (30, 30), "left out: readme, validation"),
        ({"train": {}, "x_Validation": {}, "test": {}}, {"test_split": "x_Validation"}, (30, 30), "left out: test"),
        ({"train": {}, "test": {"names": ["cat", "ant", "bee"]}}, {}, (30, 30), ""),
        ({"train": {"names": ["cat", "bee", "ant"]}, "test": WORDS}, {}, (30, 30), ""),
        ({"train": WORDS, "test": {"names": ["cat", "ant", "bee"]}}, {}, (30, 30), ""),
        ({"a/train": {}, "a/test": {}, "b/train": {}, "b/test": {}},
         {"train_split": "a/train", "test_split": "b/test"}, (30, 30), "left out: a/test, b/train"),
        ({"a/train/0000": {}, "a/train/0001": {}, "a/test/0000": {}}, {}, (60, 30), "a/train/0000, a/train/0001"),
        ({"train": {}, "test": {"labels": [-1]}}, {}, (24, 6), "no labels: test"),
        ({"train": {}, "test": {"labels": [-1]}, "validation": {}}, {}, (30, 30), "left out: test"),
        ({"train-00000-of-00001-0123456789abcdef": {}, "test": {}, ".x/test": {}}, {}, (30, 30), ""),
        ({"0000": {}, "0001": {}}, {}, (48, 12), "20 % of the images are held out"),
        ({"train": {}, "test": {"labels": [0, 0, 0]}}, {}, (30, 30), "test split has no image of 2 of the 3"),
    ],
)  # fmt: skip
def test_parquet_files_are_read_by_split_and_their_classes_by_name(
    tmp_path: Path, files: Any, settings: Any, sizes: Any, reported: str, caplog: pytest.LogCaptureFixture
) -> None:
    truth = {}
    for seed, (name, content) in enumerate(files.items()):
        file = tmp_path / "set[1]" / f"{name}.parquet"  # which is no pattern
        file.parent.mkdir(parents=True, exist_ok=True)
        table(30, seed, **content).to_parquet(file)
        ants = content.get("labels") == [0, 0, 0]
        truth |= dict(zip(images_of(30, seed), ["ant"] * 30 if ants else NAMES * 10, strict=True))
    caplog.set_level("INFO")
    data = ready(tmp_path, read(tmp_path / "set[1]", **settings))
    assert (len(data.train) + len(data.val), len(data.test)) == sizes
    assert sorted(data.class_names) == NAMES
    for split in (data.train, data.val, data.test):
        assert named(split, data.class_names).items() <= truth.items()
    assert reported in caplog.text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a/train": {}, "a/test": {}, "b/train": {}, "b/test": {}}, ["train_split=null", "a/train", "b/train"]),
        ({"one": {}, "two": {}}, ["train_split=null", "one, two"]),
        ({"train": {}, "val": {}, "valid": {}}, ["test_split=null", "val, valid"]),
        ({"train": {}, "tset": {}}, ["test_split=null", "tset"]),
        ({"train-00000-of-00003": {}, "train-00001-of-00003": {}}, ["train-00001-of-00003", "expected 3 files"]),
        (
            {"train": {}, "test": {"names": [*NAMES, "dog"], "labels": [3]}},
            ["the label of test image 0 is dog", "ant, bee, cat"],
        ),
        ({"train": {}, "test": {"kind": datasets.Value("int64")}}, ["the label of test image 0 is 0", "ant, bee, cat"]),
        ({"train": {"labels": [0, None]}, "test": {}}, ["the label of train image 1 is nan"]),
        ({"train": {"kind": STRING, "labels": ["ant", None]}, "test": {}}, ["the label of train image 1 is nan"]),
        ({"train": {}, "test": {"labels": [-1, 0]}}, ["the label of test image 0 is nan"]),
    ],
)
def test_ambiguous_or_wrong_parquet_files_are_refused(tmp_path: Path, files: Any, words: list[str]) -> None:
    for name, content in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        table(30, **content).to_parquet(tmp_path / "set" / f"{name}.parquet")
    refusal(lambda: ready(tmp_path, read(tmp_path / "set")), *words)


def test_a_file_rewritten_with_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    for seed in (0, 1):
        table(40, seed).to_parquet(tmp_path / "all.parquet")
        os.utime(tmp_path / "all.parquet", ns=(1, 1))
        data = ready(tmp_path, read(tmp_path / "all.parquet"))
        assert pixels_of(data.train, data.val, data.test) == sorted(images_of(40, seed))


def test_one_parquet_file_gives_a_fifth_for_testing_whatever_the_seed(tmp_path: Path) -> None:
    table(60).to_parquet(tmp_path / "all.parquet")
    data, other = (ready(tmp_path, read(tmp_path / "all.parquet"), split_seed=seed) for seed in (42, 7))
    assert (len(data.train), len(data.val), len(data.test)) == (43, 5, 12)
    assert torch.equal(data.test.images, other.test.images)
    assert torch.bincount(data.test.labels).tolist() == [4, 4, 4]
    assert pixels_of(data.train, data.val, data.test) == sorted(images_of(60))


@pytest.mark.parametrize("splits", [("train", "test"), ("train",), (), ("train1", "train2", "test")])
def test_save_to_disk_folders_are_read(tmp_path: Path, splits: tuple[str, ...]) -> None:
    other = ["cat", "ant", "bee"]  # the order in which the test split numbers its classes
    tables = {split: table(60, n, names=other if split == "test" else NAMES) for n, split in enumerate(splits)}
    (datasets.DatasetDict(tables) if splits else table(60)).save_to_disk(tmp_path / "saved")
    data = ready(tmp_path, read(tmp_path / "saved"))
    assert data.class_names == tuple(NAMES)
    if "test" in splits:
        truth = dict(zip(images_of(60, len(splits) - 1), NAMES * 20, strict=True))
        assert named(data.test, NAMES) == truth
    else:
        assert torch.bincount(data.test.labels).tolist() == [4] * 3
        assert pixels_of(data.train, data.val, data.test) == sorted(images_of(60))


def make_folders(root: Path, counts: dict[str, int]) -> Path:
    """So many images in each of these folders."""
    for seed, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True)
        for number, pixels in enumerate(pictures(count, 6, 6, 3, seed=seed)):
            Image.fromarray(pixels).save(root / folder / f"test_{number}.png")  # a name that is no split
    return root


def of(*splits: str, classes: Any = "pq", count: int = 10) -> dict[str, int]:
    return {f"{split}/{name}": count for split in splits for name in classes}


ANIMALS = of("train", "test", classes=NAMES, count=12)
PACKED = {f"train.X{part}/n{part}{k}": 10 for part in (1, 2) for k in "ab"}  # like ImageNet-100's archive


@pytest.mark.parametrize(
    ("counts", "settings", "sizes", "classes", "reported"),
    [
        (of("train", "test"), {}, (20, 20), "pq", ""),
        (of("Training", "VAL"), {}, (20, 20), "pq", ""),
        (of("train", "dev"), {}, (20, 20), "pq", ""),
        (of("train", "val", "valid", "test", "misc"), {}, (20, 20), "pq", "left out: misc, val, valid"),
        (of("train1", "train2", "test"), {}, (40, 20), "pq", "train1, train2 are one split"),
        (of("train1", "train2", "test"), {"train_split": "train1"}, (20, 20), "pq", "left out: train2"),
        (of("train", "val", "valid"), {"test_split": "val"}, (20, 20), "pq", "left out: valid"),
        (of("one", "two"), {"train_split": "one", "test_split": "two"}, (20, 20), "pq", ""),
        (PACKED | {f"val.X/{path[9:]}": 5 for path in PACKED}, {}, (40, 20), ["n1a", "n1b", "n2a", "n2b"],
         "train.X1, train.X2"),
        ({"p": 10, "q": 10, ".ipynb_checkpoints": 9, "__MACOSX": 9}, {}, (16, 4), "pq",
         "left out: .ipynb_checkpoints, __MACOSX"),
        ({"p": 10, "q": 10, "p/.ipynb_checkpoints": 3, "p/deeper": 3}, {}, (16, 4), "pq", "p/deeper/test_0.png"),
        (of("train") | of("test", classes="q"), {}, (20, 10), "pq", "no image of 1 of the 2 classes (p)"),
        ({"bus": 10, "car": 10, "train": 10}, {}, (24, 6), ["bus", "car", "train"], ""),
    ],
)  # fmt: skip
def test_class_folders_are_read(
    tmp_path: Path, caplog: Any, counts: Any, settings: Any, sizes: Any, classes: Any, reported: str
) -> None:
    folder = make_folders(tmp_path / "set", counts)
    truth = {}
    for seed, (path, count) in enumerate(counts.items()):
        name = next((part for part in path.split("/") if part in classes), "none")
        truth |= dict.fromkeys(images_of(count, seed), name)
    (folder / next(iter(counts)) / "notes.txt").touch()
    caplog.set_level("INFO")
    data = ready(tmp_path, read(folder, **settings))
    assert (len(data.train) + len(data.val), len(data.test)) == sizes
    assert data.class_names == tuple(classes)
    for split in (data.train, data.val, data.test):
        assert named(split, classes).items() <= truth.items()
    split_sizes = f"{len(data.train)} train, {len(data.val)} val and {sizes[1]} test images"
    for words in (reported, "notes.txt", f"{split_sizes} of {len(classes)} classes ("):
        assert words in caplog.text


@pytest.mark.parametrize(
    ("counts", "settings", "words"),
    [
        (of("train", "val", "valid"), {}, ["test_split=null", "val, valid"]),
        (of("train", "Train", "test"), {}, ["train_split=null", "Train, ", "train"]),
        (of("train", "extra"), {}, ["test_split=null", "extra"]),
        (of("train", "test"), {"test_split": "train"}, ["test_split=train", "choose one of test"]),
        (of("train", "test"), {"train_split": "tarin"}, ["train_split=tarin", "test, train"]),
        (of("train") | of("test", classes="pqz"), {}, ["the label of test image 20 is z", "p, q"]),
        ({"train": 10, "test": 10}, {}, ["no class folders"]),
        (of("cat", "dog", classes=["train", "test"]), {}, ["no class folders"]),
    ],
)
def test_ambiguous_or_wrong_class_folders_are_refused(
    tmp_path: Path, counts: Any, settings: Any, words: list[str]
) -> None:
    folder = make_folders(tmp_path / "set", counts)
    refusal(lambda: ready(tmp_path, read(folder, **settings)), *words)


@pytest.mark.parametrize("annotated", [True, False])
def test_tiny_imagenet_is_read_as_it_is_packed(tmp_path: Path, annotated: bool, caplog: Any) -> None:
    counts = {"train/n1/images": 10, "train/n2/images": 10, "val/images": 6, "test/images": 4}
    folder = make_folders(tmp_path / "tiny", counts)
    (folder / "train/n1/n1_boxes.txt").touch()
    lines = [f"test_{number}.png\tn{1 + number % 2}\t0\t0\t9\t9" for number in range(6)]
    if annotated:
        (folder / "val/val_annotations.txt").write_text("\n".join(lines))
    caplog.set_level("INFO")
    data = ready(tmp_path, read(folder))
    assert data.class_names == ("n1", "n2") and "n1_boxes.txt" in caplog.text
    if annotated:
        truth = dict(zip(images_of(6, 2), ["n1", "n2"] * 3, strict=True))
        assert named(data.test, data.class_names) == truth and "left out: test" in caplog.text
    else:
        assert len(data.test) == 4 and "no labels: test, val" in caplog.text


@pytest.mark.parametrize("as_text", [False, True])
def test_rows_of_a_table_reach_no_local_file(tmp_path: Path, as_text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "hub" / "datasets--owner--name" / "1.png"
    for file in (tmp_path / "private.png", own):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, 6, 6, 3)[0]).save(file)
    (own.parent / "link.png").symlink_to(tmp_path / "private.png")

    def tables(path: Path) -> datasets.DatasetDict:
        image = [str(path) if as_text else {"bytes": None, "path": str(path)}] * 30
        content = datasets.Dataset.from_dict({"image": image, "label": [0, 1] * 15})
        return datasets.DatasetDict(train=content, test=content)

    tables(own)["train"].to_parquet(tmp_path / "train.parquet")
    refusal(lambda: ready(tmp_path, read(tmp_path / "train.parquet", image_column="image")), "row 0", str(own))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    for path in (tmp_path / "private.png", own.parent / "link.png", own):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, path=path: tables(path))
        load = partial(ready, tmp_path, read("owner/name", image_column="image"))
        if path == own:
            assert pixels_of(load().test)[0] == images_of(1)[0]
        else:
            refusal(load, "row 0", str(path))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    folder = make_folders(tmp_path / "animals", ANIMALS)
    broken = folder / "test" / "bee" / "test_4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refusal(lambda: ready(tmp_path, read(folder)), f"{broken} cannot be read (")
    assert prepared_folders(tmp_path) == []
    spoilt = table(60).to_dict()
    spoilt["image"][7] = {"bytes": b"no image at all", "path": None}
    path = saved(tmp_path / "one", datasets.Dataset.from_dict(spoilt, features=table(60).features))
    refusal(lambda: ready(tmp_path, read(path)), "image_column=image: row 7 cannot be read (cannot identify")


def test_images_lie_upright_as_their_exif_data_says(tmp_path: Path) -> None:
    folder = make_folders(tmp_path / "animals", ANIMALS)
    picture = Image.fromarray(pictures(1, 6, 6, 3)[0])
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    for file in folder.rglob("*.png"):
        picture.save(file, exif=exif)
    data = ready(tmp_path, read(folder))
    expected = np.asarray(picture.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1)
    assert np.array_equal(data.test.images[0].numpy(), expected)


def saved(folder: Path, made: Any) -> str:
    """`made`, a table or splits of them, on disk; gives its path."""
    made = datasets.DatasetDict(made) if isinstance(made, dict) else made
    made.save_to_disk(folder)
    return str(folder)


def test_columns_are_found_by_type_then_by_name(tmp_path: Path) -> None:
    # Encoded images without the library's own metadata, as other programs write them; names as labels.
    images, labels = [encoded(pixels) for pixels in pictures(30, 6, 6, 3)], [*reversed(NAMES)] * 10
    bare = datasets.Dataset.from_dict({"img": images, "label": labels})
    path = saved(tmp_path / "bare", {"train": bare, "test": bare})
    data = ready(tmp_path, read(path))
    assert data.class_names == tuple(NAMES) and data.test.labels[:4].tolist() == [2, 1, 0, 2]
    assert pixels_of(data.test) == sorted(images_of(30))
    # CIFAR-100's two kinds of label: the one with a usual name is taken.
    fine = table(30).rename_column("label", "fine_label").add_column("coarse_label", [0, 1] * 15)
    fine = fine.cast_column("coarse_label", datasets.ClassLabel(names=["a", "b"]))
    path = saved(tmp_path / "fine", {"train": fine, "test": fine})
    assert ready(tmp_path, read(path)).class_names == tuple(NAMES)
    assert ready(tmp_path, read(path, label_column="coarse_label")).class_names == ("a", "b")


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    one = table(30)
    many = one.rename_column("image", "left").add_column("right", one.to_dict()["image"])
    many = many.cast_column("right", datasets.Image())
    path = saved(tmp_path / "many", {"train": many, "test": many})
    refusal(read(path), "dataset.source.image_column=null: ", "left, label, right")
    refusal(read(path, image_column="up"), "dataset.source.image_column=up: ", "left, label, right")
    refusal(read(path, image_column="label"), "dataset.source.image_column=label: has no images (")
    assert len(read(path, image_column="right")().train.images) == 30


def test_paths_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    file = write_npz(tmp_path / "a.npz")
    table(30).to_parquet(tmp_path / "half.parquet")
    os.truncate(tmp_path / "half.parquet", 2000)
    for path, settings, words in (
        (str(tmp_path), {"name": "full"}, "dataset.source.name=full: "),
        ("./no/such.parquet", {}, "dataset.path=./no/such.parquet: is not on disk"),
        (str(tmp_path / "notes.txt"), {}, "expected a .parquet or .npz file, or a folder"),
        (str(tmp_path / "empty"), {}, f"{tmp_path / 'empty'} has no class folders"),
        (str(tmp_path / "half.parquet"), {}, f"dataset.path={tmp_path / 'half.parquet'}: cannot be used ("),
    ):
        assert len(refusal(lambda path=path, settings=settings: ready(tmp_path, read(path, **settings)), words)) < 500
    copy = partial(sources.cifar, variant="cifar10", data_dir="nowhere")
    refusal(lambda: copy(path=str(file)), f"dataset.path={file}: has 4 classes and is not cifar10")
    refusal(lambda: sources.digits(path="x.npz"), "dataset.path=x.npz", "dataset=digits")


# --- The network -----------------------------------------------------------------------------------------


@pytest.fixture
def dead_server() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_reported_soon(
    tmp_path: Path, dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "NETWORK_TIMEOUT", 0.3)
    for endpoint, cause in ((dead_server, "timed out"), ("http://127.0.0.1:9", "Connection refused")):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        started = time.monotonic()
        refusal(
            read("owner/name"), "dataset.path=owner/name: ", cause, "dataset.path to a local copy", "HF_HUB_OFFLINE=1"
        )
        assert time.monotonic() - started < 5
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refusal(lambda: ready(tmp_path, read("owner/name")), "dataset.path=owner/name: cannot be used (")
    asked: list[Any] = []
    splits = datasets.DatasetDict({"train": table(60), "validation": table(9, seed=1)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *words: asked.append(words) or splits)
    assert pixels_of(ready(tmp_path, read("owner/name", name="small")).test) == sorted(images_of(9, 1))
    assert asked == [("owner/name", "small")]


CLASSES = [f"class {number}" for number in range(100)]


@pytest.fixture
def small_cifar(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    """CIFAR-100 with a few images and the md5s of its own, which torchvision's own code downloads from this machine."""
    kind: Any = torchvision.datasets.CIFAR100

    def batch(count: int, seed: int) -> bytes:
        labels = [row % 100 for row in range(count)]
        return pickle.dumps({"data": pictures(count, 3072, seed=seed), "fine_labels": labels})

    meta = pickle.dumps({"fine_label_names": CLASSES})
    files = {"train": batch(400, 0), "test": batch(200, 99), "meta": meta}
    archive = tmp_path_factory.mktemp("server") / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name, value in {
            "url": f"http://127.0.0.1:{server.server_port}/{archive.name}",
            "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
            "train_list": [["train", md5["train"]]],
            "test_list": [["test", md5["test"]]],
            "meta": {**kind.meta, "md5": md5["meta"]},
        }.items():
            monkeypatch.setattr(kind, name, value)
        yield kind, archive
        server.shutdown()


def test_cifar_is_downloaded_once_and_checked(tmp_path: Path, small_cifar: tuple[Any, Path]) -> None:
    kind, archive = small_cifar
    root = tmp_path / "torchvision"
    source = partial(sources.cifar, variant="cifar100", data_dir=tmp_path)
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-9] + b"x" * 9):
        archive.write_bytes(damaged)
        words = ("set dataset.path", f"put {kind.filename} into {root}")
        refusal(lambda: ready(tmp_path, source), "dataset=cifar100: cannot be downloaded (", *words)
    assert prepared_folders(tmp_path) == []
    archive.write_bytes(whole)
    data = ready(tmp_path, source, size=32, channels=3, val_fraction=0.25)
    archive.unlink()  # nothing is downloaded again
    assert data.class_names == tuple(CLASSES) and (len(data.train), len(data.val), len(data.test)) == (300, 100, 200)
    assert np.array_equal(data.test.images.numpy().reshape(-1, 3072), pictures(200, 3072, seed=99))
    (root / kind.base_folder / "test").write_bytes(b"damaged")
    assert len(source().test.labels) == 200  # unpacked again
    copy = partial(sources.cifar, variant="cifar100", data_dir="nowhere", path=str(root))
    assert torch.equal(ready(tmp_path, copy, val_fraction=0.25).test.images, data.test.images)
    (root / kind.base_folder / "test").write_bytes(b"damaged")
    refusal(copy, "dataset=cifar100: cannot be read (", "corrupted")


def test_a_download_from_a_silent_server_ends(
    tmp_path: Path, dead_server: str, small_cifar: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_cifar[0].url = dead_server
    monkeypatch.setattr(sources, "NETWORK_TIMEOUT", 0.3)
    started = time.monotonic()
    words = ("dataset=cifar100: cannot be downloaded", "timed out", "set dataset.path to a local copy")
    refusal(lambda: sources.cifar(variant="cifar100", data_dir=tmp_path), *words)
    assert time.monotonic() - started < 5 and socket.getdefaulttimeout() is None


# --- The cache -------------------------------------------------------------------------------------------


def equal(one: DataSplits, other: DataSplits) -> bool:
    parts = ((getattr(one, part), getattr(other, part)) for part in ("train", "val", "test"))
    same = [torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in parts]
    return all(same) and (one.class_names, one.mean, one.std) == (other.class_names, other.mean, other.std)


def test_the_second_start_does_not_open_the_source(tmp_path: Path) -> None:
    calls: list[int] = []

    def source() -> Source:
        calls.append(1)
        return sources.digits()

    assert equal(ready(tmp_path, source), ready(tmp_path, source))
    changes = ({"size": 9}, {"channels": 3}, {"val_fraction": 0.2}, {"split_seed": 1}, {"name": "other"})
    for number, changed in enumerate(({}, *changes)):
        ready(tmp_path, source, **changed)
        assert len(calls) == 1 + number
    ready(tmp_path, source)
    assert len(calls) == 6


def test_odd_names_stay_inside_the_folder(tmp_path: Path) -> None:
    ready(tmp_path / "data", sources.digits, name="../../owner/my set")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert prepared_folders(tmp_path / "data")[0].startswith(".._.._owner_my_set-")


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


PREPARED = [f"{part}_{kind}.npy" for part in ("train", "val", "test") for kind in ("images", "labels")]
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 9),
    "removed": lambda path: path.unlink(),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Trap(path.parent / "sprung"))),
    "other JSON": lambda path: path.write_text(json.dumps({"sha256": "", "arrays": 3})),
    "deep JSON": lambda path: path.write_text("[" * 100_000),
    **{f"flipped at {place}": partial(flip, place=place) for place in (0, 0.2, 0.5, 1)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_prepared_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    source = in_memory(pictures(40, 9, 9, 3), HALVES * 2)
    first = ready(tmp_path, source)
    (folder,) = (tmp_path / "prepared").glob("set-*")
    for file in (*PREPARED, "meta.json"):
        time.sleep(0.01)  # the file system's clock must tick, or nothing shows that the file was touched
        caplog.clear()
        DAMAGES[damage](folder / file)
        again = ready(tmp_path, source, memory_limit=0)
        assert equal(first, again) and first.digest == again.digest
        lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(lines) == 1 and f"the prepared data in {folder} are damaged (" in lines[0]
        assert not (folder / "sprung").exists()
    caplog.clear()
    ready(tmp_path, source)
    assert caplog.text == "" and prepared_folders(tmp_path) == [folder.name]


def test_the_digest_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    make_folders(tmp_path / "a", ANIMALS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "train" / "ant" / "test_0.png", ns=(1, 1))
    one, other, large = (
        ready(tmp_path / "cache", read(tmp_path / folder), memory_limit=limit)
        for folder, limit in (("a", 2 << 30), ("b", 2 << 30), ("b", 0))
    )
    assert len(one.digest) == 64 and one.digest == other.digest == large.digest
    for split in ("train", "test"):
        (tmp_path / "b" / split / "cat").rename(tmp_path / "b" / split / "dog")
    assert ready(tmp_path, read(tmp_path / "b")).digest != one.digest


def test_large_sets_are_mapped_and_equal_to_those_in_memory(tmp_path: Path) -> None:
    held = ready(tmp_path, sources.digits)
    total = sum(split.images.nbytes for split in (held.train, held.val, held.test))
    assert not ready(tmp_path, sources.digits, memory_limit=total).train.mapped
    mapped = ready(tmp_path, sources.digits, memory_limit=total - 1)
    assert [split.mapped for split in (mapped.train, mapped.val, mapped.test)] == [True] * 3
    assert equal(held, mapped)
    mapped.train.images.zero_()  # a copy of the pages: the file stays as it is
    assert equal(held, ready(tmp_path, sources.digits))


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    ready(tmp_path, sources.digits)
    (folder,) = (tmp_path / "prepared").glob("set-*")
    folder.rename(folder.with_name(f".{folder.name}.0123abcd"))
    ready(tmp_path, sources.digits)
    assert prepared_folders(tmp_path) == [folder.name]


PREPARE = """
import sys, time
from aerl.data import prepare
from aerl.data.sources import digits

def opened():
    print("opened", flush=True)
    time.sleep(1)
    return digits()

data = prepare(opened, identity={}, data_dir=sys.argv[1], name="digits", size=64, channels=None,
               val_fraction=0.1, split_seed=42)
print(len(data.train), data.train.images.sum().item())
print(*sorted({"datasets", "sklearn", "torchvision", "PIL", "hydra"} & set(sys.modules)))
"""


def test_of_two_processes_at_once_one_prepares_and_the_other_waits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in started]
    waited, prepared = sorted(outputs, key=len)
    assert prepared[0] == "opened" and prepared[1] == waited[0] and waited[0].startswith("1293 ")
    assert waited[1] == ""  # no library of a source was imported where the data was there already
    assert len(prepared_folders(tmp_path)) == 1


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 100 kB, which to a program is like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, small_files: None) -> None:
    refusal(lambda: ready(tmp_path, sources.digits, size=32), f"data_dir={tmp_path}: ", "File too large")
    assert prepared_folders(tmp_path) == []
    assert len(ready(tmp_path, sources.digits).test) == 360  # which is small enough


def test_a_data_dir_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal(lambda: ready(tmp_path / "file", sources.digits), f"data_dir={tmp_path / 'file'}: ", "a directory")


# --- Batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_and_mapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split]:
    """The training digits, in memory and as a map."""
    folder = tmp_path_factory.mktemp("digits")
    held, mapped = ready(folder, sources.digits), ready(folder, sources.digits, memory_limit=0)
    return held.train, mapped.train


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_map_gives_the_very_batches_of_memory(
    held_and_mapped: tuple[Split, Split], seed: int | None, drop_last: bool
) -> None:
    held, mapped = (Batches(split, 100, drop_last=drop_last) for split in held_and_mapped)
    assert len(held) == len(mapped) == (12 if drop_last else 13)
    for epoch in range(2):
        generators = [None if seed is None else seeded(seed + epoch) for _ in range(2)]
        pairs = zip(held.epoch(generators[0]), mapped.epoch(generators[1]), strict=True)
        labels = []
        for (images, ours), (mapped_images, theirs) in pairs:
            assert torch.equal(images, mapped_images) and torch.equal(ours, theirs)
            labels.append(ours)
        assert len(labels) == len(held)
        assert [len(batch) for batch in labels] == [100] * 12 + ([] if drop_last else [93])


def test_an_epoch_has_every_sample_once_in_the_order_of_its_seed(
    held_and_mapped: tuple[Split, Split],
) -> None:
    split, _ = held_and_mapped
    batches = Batches(split, 64)
    in_order = torch.cat([labels for _, labels in batches.epoch()])
    assert torch.equal(in_order, split.labels)
    images = torch.cat([images for images, _ in batches.epoch(seeded(1))])
    order = torch.randperm(len(split), generator=seeded(1))
    assert torch.equal(images, split.images[order])
    generator = seeded(1)
    first, second = (torch.cat([labels for _, labels in batches.epoch(generator)]) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"), [(5, True, [5]), (8, True, [8]), (9, True, [8]), (9, False, [8, 1])]
)
def test_an_incomplete_batch_is_dropped_unless_it_is_the_only_one(
    count: int, drop_last: bool, sizes: list[int]
) -> None:
    split = Split(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    batches = Batches(split, 8, drop_last=drop_last)
    assert [len(labels) for _, labels in batches.epoch()] == sizes
    assert [len(labels) for _, labels in batches.epoch(seeded(0))] == sizes
    assert len(batches) == len(sizes)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_no_thread_outlives_an_epoch_that_is_left_early(held_and_mapped: tuple[Split, Split]) -> None:
    epoch = Batches(held_and_mapped[1], 10).epoch(seeded(0))
    next(epoch)
    assert len(reading_threads()) == 1
    del epoch
    assert reading_threads() == []
    for _ in Batches(held_and_mapped[1], 500).epoch(seeded(0)):
        pass
    assert reading_threads() == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_to_unit_is_exactly_a_division_by_255(memory_format: torch.memory_format) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(2, 3, 8, 16)
    unit = to_unit(images, memory_format)
    assert unit.is_contiguous(memory_format=memory_format)
    assert unit.dtype == torch.float32
    assert torch.equal(unit, images.float() / 255)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu(held_and_mapped: tuple[Split, Split]) -> None:
    for split in held_and_mapped:
        pairs = zip(Batches(split, 100).epoch(seeded(0)), Batches(split, 100, "cuda").epoch(seeded(0)), strict=True)
        for (images, labels), (on_gpu, labels_on_gpu) in pairs:
            assert on_gpu.device.type == labels_on_gpu.device.type == "cuda"
            assert torch.equal(images, on_gpu.cpu()) and torch.equal(labels, labels_on_gpu.cpu())


# --- Real images -----------------------------------------------------------------------------------------


@needs_real_images
def test_ten_thousand_real_cifar_images(tmp_path: Path) -> None:
    file = REAL / "cifar10" / "test.parquet"
    data = ready(
        tmp_path,
        partial(sources.cifar, variant="cifar10", data_dir="nowhere", path=str(file)),
        size=32,
        channels=3,
    )
    assert (len(data.train), len(data.val), len(data.test)) == (7200, 800, 2000)
    assert data.image_shape == (3, 32, 32)
    assert data.class_names[3:6] == ("cat", "deer", "dog")
    assert data.mean == pytest.approx([0.49, 0.48, 0.45], abs=0.02)
    assert data.std == pytest.approx([0.25, 0.24, 0.26], abs=0.02)

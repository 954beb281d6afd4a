"""Datasets: opened by a source, prepared once, and handed out in batches."""

from aerl.data.augmentation import augment, mix
from aerl.data.batches import Batches, to_unit
from aerl.data.prepare import prepare
from aerl.data.sources import Source, Table
from aerl.data.splits import DataSplits, Split, limit_training, rows, subset

__all__ = [
    "Batches",
    "DataSplits",
    "Source",
    "Split",
    "Table",
    "augment",
    "limit_training",
    "mix",
    "prepare",
    "rows",
    "subset",
    "to_unit",
]

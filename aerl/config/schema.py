"""The schema: every key, its type and its bounds.

What YAML files compose to is checked before anything is computed or written: the fixed sections against the classes
below, each `_target_` against the signature of what it names (aerl.config.targets).
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from aerl.types import Count, Index, NonNegative, Norm, Number, Positive, Probability, finite, quotient


def _has_target(spec: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(spec.get("_target_"), str):
        raise ValueError("needs a _target_: the dotted name of a function or class")
    return spec


def _below_runs_dir(name: str) -> str:
    """It becomes part of a run folder's path, which overwrite=true discards."""
    path = Path(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise ValueError("must be the name of a folder below runs_dir")
    for part in path.parts:
        if part[0] in "-~" or part[-1] in ". " or len(part.encode()) > 255:  # the limit of Linux's file systems
            raise ValueError(
                "must be a folder's name of at most 255 bytes, not begin with - or ~, nor end with . or space"
            )
    return name


Setting = Annotated[Any, AfterValidator(quotient), AfterValidator(finite)]
Target = Annotated[dict[str, Setting], AfterValidator(_has_target)]
Name = Annotated[str, AfterValidator(_below_runs_dir)]
Folder = Annotated[str, Field(min_length=1)]


def _metric_name(name: str) -> str:
    """It ends a column of outcomes.npz, after the attack's name and an underscore."""
    if not re.fullmatch("[a-zA-Z][a-zA-Z0-9]*", name):
        raise ValueError("must be a name of letters and digits")
    if name in ("pred", "p", "confidence", "entropy", "l2", "linf"):
        raise ValueError("is measured in every run; choose another name")
    return name


MetricName = Annotated[str, AfterValidator(_metric_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Augmentation(Section):
    hflip: Probability
    vflip: Probability
    translate: Probability


class Dataset(Section):
    name: Name
    epochs: Count
    path: str | None
    size: Count | None
    channels: Literal[1, 3] | None
    train_samples: Count | None
    val_fraction: Annotated[Positive, Field(lt=1)]
    split_seed: Annotated[Index, Field(lt=2**32)]  # as NumPy takes them
    augmentation: Augmentation
    source: Target


class Model(Section):
    name: Name
    mean: list[Number] | None
    std: list[Positive] | None
    net: Target


class Schedule(Section):
    kind: Literal["constant", "linear", "cosine"]
    warmup: Probability


class Adversary(Section):
    start_epoch: Index
    weight: NonNegative
    attack: Target


class Trainer(Section):
    name: Name
    epochs: Count
    batch_size: Count
    optimizer: Target
    schedule: Schedule
    clip: Positive | None
    objective: Target
    act: Target
    probability_floor: Probability
    adversary: Adversary | None
    select: Literal["val_accuracy", "val_loss", "val_adversarial_accuracy", "last"]


class Evaluation(Section):
    samples: Count | None
    batch_size: Count | None
    policy: Literal["argmax", "sample"]
    survivors_only: bool


class Hardware(Section):
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    tf32: bool
    channels_last: bool
    compile: bool
    fused: bool
    threads: Annotated[Count, Field(le=1024)] | None
    deterministic: bool
    distributed: bool


class Logger(Section):
    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]*$")]  # as W&B takes them
    entity: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\s]*$")] | None
    group: str | None
    tags: list[str]
    artifacts: bool


class Config(Section):
    seed: Index
    norm: Norm
    eps: NonNegative
    checkpoint: str | None
    runs_dir: Folder
    data_dir: Folder
    name: Name | None
    overwrite: bool
    prepare_data_only: bool
    dataset: Dataset
    model: Model
    trainer: Trainer | None
    attack: dict[str, Target]
    metric: dict[MetricName, Target]
    analysis: dict[str, Target]
    evaluation: Evaluation
    hardware: Hardware
    logger: Logger

    @property
    def trainer_name(self) -> str:
        return "none" if self.trainer is None else self.trainer.name

"""The schema: every key of the configuration, its type and its bounds.

The fixed sections are checked against the classes below, each `_target_` by `aerl.config.targets`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from aerl.errors import UserError
from aerl.types import Count, Index, NonNegative, Norm, Number, Positive, Probability, finite, quotient


def _folder_name(name: str) -> str:
    """Part of a run folder's path, which overwrite=true empties: it must stay below runs_dir."""
    part = r"[^/~-][^/]*(?<![. ])"
    if len(name.encode()) > 255 or not name.isprintable() or not re.fullmatch(f"{part}(/{part})*", name):
        raise ValueError("must name a folder below runs_dir: at most 255 bytes, no ~ or - first, no . or space last")
    return name


def _metric_name(name: str) -> str:
    """The end of a column of outcomes.npz, after the attack's name."""
    if not re.fullmatch("[a-zA-Z][a-zA-Z0-9]*", name):
        raise ValueError("must be a name of letters and digits")
    if name in ("pred", "p", "confidence", "entropy", "l1", "l2", "linf"):
        raise ValueError("is measured in every run; choose another name")
    return name


Target = dict[str, Annotated[Any, AfterValidator(quotient), AfterValidator(finite)]]  # its _target_ and settings
Name = Annotated[str, AfterValidator(_folder_name)]
MetricName = Annotated[str, AfterValidator(_metric_name)]
Folder = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Augmentation(Section):
    hflip: Probability = 0.0
    vflip: Probability = 0.0
    translate: Probability = 0.0
    crop: Index = 0
    cutout: Index = 0
    randaugment: Index = 0
    magnitude: Annotated[Index, Field(le=30)] = 9
    cutmix: NonNegative = 0.0
    mixup: NonNegative = 0.0


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
    kind: Literal["constant", "linear", "cosine", "one_cycle", "step"]
    warmup: Probability
    floor: Probability = 0.0
    per: Literal["step", "epoch"] = "step"
    start: Probability = 0.0
    restarts: Index = 0
    milestones: list[Index] = []
    gamma: Probability = 0.1


class Adversary(Section):
    start_epoch: Index
    weight: NonNegative
    attack: Target
    judge: Target | None = None


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
    until: Probability | None = None
    patience: Count | None = None
    ema: Annotated[Probability, Field(lt=1)] | None = None


class Evaluation(Section):
    samples: Count | None
    batch_size: Count | None
    policy: Literal["argmax", "sample"]
    survivors_only: bool
    evidence: bool | None
    withhold_normalization: bool = False


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
    tensorboard: bool = False
    csv: bool = False


class Config(Section):
    seed: Index
    norm: Norm
    eps: NonNegative
    radii: list[NonNegative] = []  # several eps, ascending, the last being `eps`: aerl.config.compose.read sets them
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

    def check_threat(self) -> None:
        """UserError for an eps of pixels in 0..255."""
        if self.norm == "Linf" and self.eps > 1:
            raise UserError(f"eps={self.eps:g}: pixels are in [0, 1]; did you mean {self.eps:g}/255?")

    @property
    def trainer_name(self) -> str:
        return "none" if self.trainer is None else self.trainer.name

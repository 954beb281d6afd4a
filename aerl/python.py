"""Evaluate a model from Python, by the same code as launch.py: `aerl.evaluate`, `aerl.load_model`."""

import html
import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aerl.analyses.run import run_analyses
from aerl.attacks import Attack, AttackSpec
from aerl.attacks.direct import check_images, check_labels, device_of
from aerl.attacks.foreign import as_attack, name_of
from aerl.build import Parts, analysis, attack, build_data
from aerl.config.options import IN_MEMORY, check_targets, read_option
from aerl.config.schema import Config
from aerl.data import DataSplits, Split
from aerl.errors import UserError
from aerl.evaluation.evaluate import evaluate as evaluate_run
from aerl.models.build import build_model
from aerl.models.classifier import Adapted, Classifier
from aerl.models.probe import probe
from aerl.report import page, table
from aerl.runtime.device import Hardware, describe
from aerl.runtime.files import load_arrays, writing
from aerl.runtime.paths import local
from aerl.tracking.results import read_config, read_summary, write_summary
from aerl.tracking.run_folder import recorded
from aerl.training import checkpoint
from aerl.types import Norm

if TYPE_CHECKING:
    import pandas as pd

Images = Tensor | np.ndarray | Dataset[Any] | DataLoader[Any]
Attacks = str | Attack | AttackSpec | Sequence[Any]


class Accuracy(NamedTuple):
    """A share of n images, with its 95 % interval from low to high."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f} %, n={self.n})"


def evaluate(
    model: nn.Module,
    images: Images,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    norm: Norm = "Linf",
    eps: float = 8 / 255,
    attacks: Attacks = "suite",
    analyses: Sequence[str] = ("masking", "planted"),
    seed: int = 0,
    batch_size: int | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "",
) -> "Report":
    """How many images withstand all attacks, and whether that number can be believed.

    model: maps images (B, C, H, W) in [0, 1] to logits (B, K), the normalisation inside, in eval mode. For another one
        see `aerl.adapt`. It is attacked on its own device, and left as it was.
    images, labels: float images (N, C, H, W) in [0, 1] and labels (N,); or a Dataset of (image, label) or a DataLoader
        that does not shuffle, without labels. They are kept in memory.
    norm, eps: the threat model, "L1", "L2" or "Linf", for pixels in [0, 1].
    attacks: an option of conf/attack ("suite", "pgd", ...), an attack of aerl, a function of (model, x, y), an attack
        of torchattacks, foolbox or adversarial-library, or a list of these. With "suite" each attack gets the images
        that withstood the ones before.
    analyses: options of conf/analysis; "standard" makes all figures, () none.
    batch_size: images at a time; None: 128 on the CPU, 512 on a GPU.
    class_names, name: for the tables and figures.

    Nothing is written but a temporary folder, which ends with the report. Raises UserError for images, labels or a
    model that cannot be evaluated.
    """
    x, y = _collect(images, labels)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: a {type(model).__name__}; expected a torch.nn.Module, see aerl.adapt")
    if model.training:
        raise UserError("model: is in training mode; call model.eval() first")
    device = device_of(model) or x.device
    if device.type == "meta":
        raise UserError("model: is on the device meta, and has no weights")
    net = model if isinstance(model, Adapted) else Adapted(model, None)
    classes = check_labels(net, x[:8].to(device), y)
    specs, survivors_only, plain = _attacks(attacks, norm, eps)
    sections: dict[str, Any] = {}
    for option in [analyses] if isinstance(analyses, str) else analyses:
        sections |= read_option("analysis", option)[0]
    name = name or type(model.net if isinstance(model, Adapted | Classifier) else model).__name__
    config = _config(
        name=name, norm=norm, eps=eps, seed=seed, attack=plain, analysis=sections,
        evaluation={"batch_size": batch_size, "survivors_only": survivors_only},
    )  # fmt: skip
    names = tuple(class_names or map(str, range(classes)))
    if len(names) != classes:
        raise UserError(f"class_names: {len(names)} names; the model has {classes} classes")
    config.check_threat()
    empty = Split(x[:0], y[:0])
    data = DataSplits(empty, empty, Split(x, y), names, (), (), checkpoint.digest({"images": x, "labels": y}))
    hardware = Hardware(device, channels_last=False)
    doubts = probe(net, x[:8].to(device))
    given: dict[str, Any] = {"load": lambda runs, key: {}, "store": None, "tested": None}  # there are no other runs
    made = {key: analysis(spec, f"analysis.{key}", given) for key, spec in sections.items()}
    parts = Parts(hardware, data, net, None, specs, {}, made, tuple(doubts))
    digests = {"dataset=images": data.digest, "weights": checkpoint.digest(model.state_dict())}
    folder = tempfile.TemporaryDirectory(prefix="aerl-")
    place = Path(folder.name) / "run"
    with _cudnn_restored(), recorded(
        place, config, {}, overrides=[], environment=describe(hardware), inputs=digests, choices={}, data=data.facts
    ) as record:  # fmt: skip
        record.save(doubts=doubts, trained=None)
        outcomes, split = evaluate_run(parts, config, record)
        run_analyses(parts, config, record, outcomes, split)
    page.write_run(place)
    return Report(place, folder)


class Report:
    """What `evaluate` found: `print(report)` is the closing table; in a notebook it is the page."""

    def __init__(self, folder: Path, temporary: Any = None) -> None:
        """`folder` is that of a finished run, also one of launch.py; `temporary` is deleted with this object."""
        self.folder, self._temporary = Path(folder), temporary
        found = read_summary(self.folder)
        if found is None or found["status"] != "finished":
            raise UserError(f"{folder}: expected the folder of a finished run")
        self.summary: Mapping[str, Any] = found

    @property
    def clean(self) -> Accuracy:
        return Accuracy(**self.summary["clean_accuracy"])

    @property
    def worst_case(self) -> Accuracy | None:
        """The share of images that are right clean and under every attack that counts; None without one."""
        worst = self.summary["worst_case_accuracy"]
        return None if worst is None else Accuracy(**worst)

    @property
    def attacks(self) -> dict[str, Accuracy]:
        """The accuracy under each attack."""
        return {name: Accuracy(**info["robust_accuracy"]) for name, info in self.summary["attacks"].items()}

    @property
    def masking(self) -> str | None:
        """The verdict of the masking audit: "no sign", "suspicious" or "masked", with what it names; None without."""
        return (self.summary.get("masking") or {}).get("verdict")

    @property
    def headline(self) -> str:
        """The number, and whether it can be relied on."""
        return " ".join(table.headline(self.summary))

    @cached_property
    def outcomes(self) -> dict[str, np.ndarray]:
        """The arrays (N,) of outcomes.npz, see docs/reference.md."""
        return load_arrays(self.folder / "outcomes.npz")

    @cached_property
    def adversarial(self) -> dict[str, np.ndarray]:
        """`images` float32 (m, C, H, W), which fool the model; `row` (m,) of the image they are near; `attack` (m,)."""
        return load_arrays(self.folder / "evidence.npz")

    def to_frame(self) -> "pd.DataFrame":
        """A row for each image: label, prediction, and what each attack did to it."""
        import pandas as pd

        return pd.DataFrame(self.outcomes)

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary run folder, with report.html; returns it. UserError if it exists and is not empty."""
        out = Path(folder).expanduser()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists; name a new folder")
        with writing(out):
            shutil.copytree(self.folder, out, dirs_exist_ok=True)
        write_summary(out, {**self.summary, "folder": str(out)})
        page.write_run(out)
        return out

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        console = Console(file=stream, width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
        table.show(self.summary, console)
        return stream.getvalue().strip("\n")

    def _repr_html_(self) -> str:
        text = html.escape((self.folder / page.NAME).read_text(), quote=True)
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 40rem; border: 1px solid #ccc"></iframe>'


def load_model(run: str | Path, device: torch.device | str = "cpu", *, trust: bool = False) -> nn.Module:
    """The model of a finished run, an export or hf://OWNER/NAME: images (B, C, H, W) in [0, 1] to logits, in eval mode.

    `trust` allows a network that is not aerl's: config.yaml then names code that is run. Raises UserError for a folder
    without a model.
    """
    folder = local(str(run), "run")
    summary = read_summary(folder)
    if summary is None or not (folder / "config.yaml").is_file():
        raise UserError(f"run={run}: expected the folder of a run, an export or hf://OWNER/NAME")
    config = Config.model_validate(read_config(folder, summary))
    if not trust:
        check_targets(config.model_dump(), summary.get("choices") or {}, f"run={run}", "use trust=True")
    weights = None
    if config.checkpoint != "own":
        evaluated = config.trainer is None and (summary.get("weights") or {}).get("file") != "model.safetensors"
        weights = checkpoint.find(str(config.checkpoint) if evaluated else str(folder), "run")
    facts = summary.get("data")
    if facts:
        channels, height, width = facts["image_shape"]
        blank = torch.zeros(0, channels, height, width, dtype=torch.uint8)
        nothing = Split(blank, torch.zeros(0, dtype=torch.int64))
        unit = (0.0,) * channels, (1.0,) * channels
        data = DataSplits(nothing, nothing, nothing, tuple(facts["class_names"]), *unit)
    else:  # a run of an earlier version
        data = build_data(config)
    model = build_model(config, data, Hardware(torch.device(device), channels_last=False))
    if weights is not None and not checkpoint.load_weights(model, weights, "run") and None in (
        config.model.mean, config.model.std
    ):  # fmt: skip
        raise UserError(f"run={run}: its weights have no normalisation")
    return model.eval()


def _collect(images: Images, labels: Any) -> tuple[Tensor, Tensor]:
    """Float images (N, C, H, W) in [0, 1] and labels int64 (N,), on the CPU or where they are; UserError."""
    if isinstance(images, DataLoader | Dataset):
        if labels is not None:
            raise UserError(f"labels: the {type(images).__name__} has its own; leave them out")
        images, labels = _read(images)
    if labels is None:
        raise UserError("labels: missing; expected one for each image")
    x = torch.as_tensor(images) if isinstance(images, np.ndarray) else images
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"labels: {error}") from error
    check_images(x, y)
    if len(x) == 0:
        raise UserError("images: none; expected at least one")
    return x.detach().float(), y.detach().long().to("cpu")


def _read(source: "Dataset[Any] | DataLoader[Any]") -> tuple[Tensor, Tensor]:
    """All images and labels; UserError if a second pass begins with others."""
    loader = source if isinstance(source, DataLoader) else DataLoader(source, batch_size=256)
    try:
        batches = [(x, y) for x, y in loader]
        again = next(iter(loader))
    except (TypeError, ValueError, StopIteration) as error:
        raise UserError(
            f"images: expected pairs of a tensor (C, H, W) in [0, 1] and a label, as with transform=ToTensor(): {error}"
        ) from error
    if not all(
        torch.equal(torch.as_tensor(one), torch.as_tensor(two)) for one, two in zip(batches[0], again, strict=True)
    ):
        raise UserError(
            "images: two passes over them differ; use shuffle=False and no random augmentation, so that the rows of "
            "the report can be found again"
        )
    return torch.cat([x for x, _ in batches]), torch.cat([torch.as_tensor(y) for _, y in batches])


def _attacks(attacks: Any, norm: Norm, eps: float) -> tuple[dict[str, AttackSpec], bool, dict[str, dict[str, Any]]]:
    """The attacks by name, whether each gets only the survivors, and what config.yaml says of them."""
    several = isinstance(attacks, Sequence) and not isinstance(attacks, str)
    specs: dict[str, AttackSpec] = {}
    plain: dict[str, dict[str, Any]] = {}
    survivors_only = False

    def add(name: str, spec: AttackSpec, stated: dict[str, Any]) -> None:
        key = next(key for n in count(1) if (key := name if n == 1 else f"{name}_{n}") not in specs)
        specs[key], plain[key] = spec, stated

    for each in attacks if several else [attacks]:
        if isinstance(each, str):
            sections, rest = read_option("attack", each, norm=norm, eps=eps)
            survivors_only |= bool(rest.get("evaluation", {}).get("survivors_only"))
            for name, section in sections.items():
                add(name, attack(section, f"attack.{name}", norm, eps), section)
            continue
        if not callable(each) and not isinstance(each, AttackSpec):
            raise UserError(f"attacks: a {type(each).__name__}; expected the name of an option, or an attack")
        call = each.call if isinstance(each, AttackSpec) else each
        name = name_of(call) or "attack"
        spec = AttackSpec.of(each if isinstance(each, AttackSpec) else as_attack(call, norm, eps), f"attacks.{name}")
        add(name, spec, {"_target_": f"{getattr(call, '__module__', '')}.{name}"})
    return specs, survivors_only, plain


def _config(*, name: str, norm: Norm, eps: float, seed: int, evaluation: Mapping[str, Any], **groups: Any) -> Config:
    """What launch.py composes from conf/, for images and a model in memory."""
    from pydantic import ValidationError

    from aerl.config.errors import pydantic_line

    unset = dict.fromkeys(("path", "size", "channels", "train_samples"))
    dataset = {"name": "images", "epochs": 1, "val_fraction": 0.5, "split_seed": 0, "augmentation": {},
               "source": {"_target_": IN_MEMORY}, **unset}  # fmt: skip
    rest = {"samples": None, "policy": "argmax", "evidence": None}
    hardware = dict.fromkeys(("tf32", "channels_last", "compile", "fused", "deterministic", "distributed"), False)
    logger: dict[str, Any] = {
        "mode": "disabled",
        "project": "aerl",
        "entity": None,
        "group": None,
        "tags": [],
        "artifacts": False,
    }
    try:
        return Config.model_validate({
            "seed": seed, "norm": norm, "eps": eps, "checkpoint": "own", "runs_dir": "runs", "data_dir": "~",
            "name": None, "overwrite": False, "prepare_data_only": False, "dataset": dataset, "trainer": None,
            "model": {"name": name, "mean": [0.0], "std": [1.0], "net": {"_target_": IN_MEMORY}}, "metric": {},
            "evaluation": {**rest, **evaluation}, "logger": logger,
            "hardware": {**hardware, "device": "auto", "precision": "fp32", "threads": None}, **groups,
        })  # fmt: skip
    except ValidationError as error:
        raise UserError(pydantic_line(error)) from error


@contextmanager
def _cudnn_restored() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before

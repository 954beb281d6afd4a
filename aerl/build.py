"""From a checked configuration to the objects of a run. Nothing is written here but the dataset cache."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerl.attacks import AttackSpec, SampleGenerator
from aerl.attacks.foreign import as_attack
from aerl.config.compose import of_run, run_names
from aerl.config.schema import Config, Model
from aerl.config.targets import bind, locate
from aerl.data import DataSplits, augment, limit_training, mix, prepare, rows, to_unit
from aerl.errors import UserError, foreign_code, is_foreign, named
from aerl.evaluation.metrics import Metric
from aerl.models import Classifier
from aerl.models.build import SIZES, build_model, build_net
from aerl.models.probe import drawn, probe
from aerl.runtime import ddp, device
from aerl.runtime.device import Hardware
from aerl.runtime.paths import local
from aerl.tracking import loggers
from aerl.training import checkpoint
from aerl.training.loop import Adversary, Recipe, check_recipe
from aerl.training.objectives import takes_mixed_labels
from aerl.training.schedule import Schedule
from aerl.types import Norm, box_width

log = logging.getLogger("aerl")

# Parameters by which attacks and analyses get the models of other runs, a folder for their examples, and the samples.
_UNSET = {"load": None, "store": None, "tested": None}
_WITHHELD = (
    "evaluation.withhold_normalization=true: judged on images at another scale than it was trained on, so none of "
    "these numbers is its accuracy or robustness"
)


@dataclass(frozen=True)
class Parts:
    """The objects of a run. `recipe` is None if nothing is trained; `doubts` about the model are shown first."""

    hardware: Hardware
    data: DataSplits
    model: nn.Module
    recipe: Recipe | None
    attacks: Mapping[str, AttackSpec]
    metrics: Mapping[str, Metric]
    analyses: Mapping[str, Callable[..., Any]]
    doubts: tuple[str, ...] = ()


def check(config: Config) -> Recipe | None:
    """Check what needs neither data nor model; returns the recipe. Raises UserError."""
    for name, spec in config.attack.items():
        attack(spec, f"attack.{name}", config.norm, config.eps)
    for name, spec in config.analysis.items():
        bind(spec, f"analysis.{name}", given=_UNSET, later=["context"])
    build_metrics(config)
    loggers.check(config)
    bind(config.model.net, "model.net", given=dict.fromkeys(SIZES))
    recipe = build_recipe(config)
    if recipe is None and config.checkpoint is None:
        raise UserError("checkpoint=null: trainer=none needs a model: a run folder, a .pt file, or own (model.net's)")
    return recipe


def build(config: Config) -> Parts:
    """Raises UserError for whatever does not fit; the quickest checks come first."""
    recipe = check(config)
    weights = checkpoint.find(config.checkpoint) if config.checkpoint not in (None, "own") else None
    hardware = device.set_up(**config.hardware.model_dump())
    if recipe is not None and hardware.compile:
        device.check_compiler(hardware)
    data = build_data(config)
    if data.test_only and recipe is not None:
        raise UserError(
            f"dataset.path={config.dataset.path}: has no X_train; it only evaluates: trainer=none checkpoint=RUN"
        )
    if config.eps > (widest := box_width(config.norm, math.prod(data.image_shape))):
        log.warning("eps=%g: an %s ball above %.3g holds every image of this size", config.eps, config.norm, widest)
    if (config.evaluation.samples or 0) > len(data.test):
        raise UserError(f"evaluation.samples={config.evaluation.samples}: the test split has {len(data.test)} images")
    model = build_model(config, data, hardware, 0 if recipe is None else min(recipe.batch_size, len(data.train)))
    load = partial(load_models, config=config, data=data, hardware=hardware)
    index = rows(len(data.test), config.evaluation.samples)
    tested = config.dataset.name, {"label": data.test.labels[index].numpy(), "index": index.numpy()}
    given = {"load": load, "store": local(config.data_dir, "data_dir") / "crafted", "tested": tested}
    threat = config.norm, config.eps
    attacks = {name: attack(spec, f"attack.{name}", *threat, given) for name, spec in config.attack.items()}
    analyses = {name: analysis(spec, f"analysis.{name}", given) for name, spec in config.analysis.items()}
    x = to_unit(data.test.images[:8].to(hardware.device), hardware.memory_format)
    y = data.test.labels[:0].to(hardware.device)
    for name, spec in attacks.items():
        if not is_foreign(spec.call):  # aerl's attacks check their settings against each other when they are called
            with named(f"attack.{name}"):
                spec.call(model, x[:0], y, generator=SampleGenerator.for_images(x[:0], seed=0))
    if config.checkpoint is not None:
        _load_weights(model, weights, config.model, f"checkpoint={config.checkpoint}")
    if recipe is not None:
        check_recipe(recipe, model, hardware.device)
    untrained = drawn(model.net, build_net(config, data, "other weights")) if config.checkpoint == "own" else []
    with foreign_code(f"model={config.model.name}", model.net):
        doubts = probe(model, x)
    if config.evaluation.withhold_normalization:
        doubts.insert(0, _WITHHELD)
    return Parts(hardware, data, model, recipe, attacks, build_metrics(config), analyses, (*untrained, *doubts))


def _callable(
    spec: Mapping[str, Any], key: str, positional: Sequence[str], given: Mapping[str, Any],
    keywords: Sequence[str] = (), adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda bound: bound,
) -> Callable[..., Any]:  # fmt: skip
    """The function of a `_target_` with its settings bound, or an instance of the class; or what `adapt` makes of it.

    Raises UserError if it cannot be called with these positional and keyword arguments.
    """
    bound = bind(spec, key, given=given, later=[*positional, *keywords], positional=len(positional))
    with named(key), foreign_code(key, bound.func):
        if (adapted := adapt(bound)) is not bound:
            return adapted
        function = bound() if inspect.isclass(bound.func) else bound
    try:
        inspect.signature(function).bind(*positional, **dict.fromkeys(keywords))
    except (TypeError, ValueError) as error:
        arguments = ", ".join([*positional, *(f"{name}={name}" for name in keywords)])
        raise UserError(f"{key}._target_={spec['_target_']}: cannot be called with ({arguments}): {error}") from error
    return function


def attack(spec: Mapping[str, Any], key: str, norm: Norm, eps: float, given: Mapping[str, Any] = _UNSET) -> AttackSpec:
    """`attack(model, x, y, *, generator)` with its settings, in a run with this threat model."""
    adapt = partial(as_attack, norm=norm, eps=eps)
    return AttackSpec.of(_callable(spec, key, ["model", "x", "y"], given, ["generator"], adapt), key)


def analysis(spec: Mapping[str, Any], key: str, given: Mapping[str, Any] = _UNSET) -> Callable[..., Any]:
    """`analysis(context)` with its settings."""
    return _callable(spec, key, ["context"], given)


def build_metrics(config: Config) -> dict[str, Metric]:
    """Functions `metric(logits, labels)`, see `aerl.evaluation.metrics`."""
    return {name: _callable(spec, f"metric.{name}", ["logits", "labels"], {}) for name, spec in config.metric.items()}


def build_recipe(config: Config) -> Recipe | None:
    """The trainer with its functions; None for trainer=none."""
    trainer = config.trainer
    if trainer is None:
        return None
    adversary = None
    if trainer.adversary is not None:

        def bound(key: str, spec: Mapping[str, Any]) -> Any:
            return attack(spec, f"trainer.adversary.{key}", config.norm, config.eps, {"in_training": True}).call

        judge = None if trainer.adversary.judge is None else bound("judge", trainer.adversary.judge)
        adversary = Adversary(bound("attack", trainer.adversary.attack), trainer.adversary.start_epoch, judge)
    never = adversary is None or adversary.start_epoch >= trainer.epochs
    if never and trainer.select == "val_adversarial_accuracy":
        raise UserError(f"trainer.select={trainer.select}: needs trainer.adversary with start_epoch < {trainer.epochs}")
    act: Any = _callable(trainer.act, "trainer.act", ["logits", "labels", "generator"], {})
    given = {
        "act": act,
        "weight": trainer.adversary.weight if trainer.adversary else 0.0,
        "probability_floor": trainer.probability_floor,
    }
    objective = _callable(trainer.objective, "trainer.objective", ["model", "x", "y"], given, ["x_adv", "generator"])
    target = trainer.objective["_target_"]
    takes = inspect.signature(locate(target, "trainer.objective")).parameters
    if trainer.probability_floor and "probability_floor" not in takes:
        raise UserError(f"trainer.probability_floor={trainer.probability_floor:g}: {target} has no floor; expected 0")
    call = objective.forward if isinstance(objective, nn.Module) else objective
    scheduled = hasattr(act, "at") and "act" in inspect.signature(call).parameters
    images = config.dataset.augmentation.model_dump()
    labels = {key: images.pop(key) for key in ("cutmix", "mixup")}
    for key, alpha in labels.items():
        if alpha and not takes_mixed_labels(objective, act):
            raise UserError(
                f"dataset.augmentation.{key}={alpha:g}: mixes the labels of two images, and an action has one class; "
                f"expected 0, or a trainer by cross-entropy: trainer=ce trains like rl"
            )
    schedule = Schedule(**trainer.schedule.model_dump())
    schedule.check(trainer.epochs)
    return Recipe(
        epochs=trainer.epochs,
        batch_size=trainer.batch_size,
        optimizer=bind(trainer.optimizer, "trainer.optimizer", later=["params"]),
        objective=objective,
        schedule=schedule,
        clip=trainer.clip,
        adversary=adversary,
        select=trainer.select,
        until=trainer.until,
        patience=trainer.patience,
        ema=trainer.ema,
        act=act if scheduled else None,
        augment=partial(augment, **images),
        mix=partial(mix, **labels) if any(labels.values()) else None,
    )


def build_data(config: Config) -> DataSplits:
    dataset, data_dir = config.dataset, local(config.data_dir, "data_dir")
    source = bind(dataset.source, "dataset.source", given={"data_dir": data_dir})
    settings = dataset.model_dump(include={"name", "size", "channels", "val_fraction", "split_seed"})
    with foreign_code("dataset.source", source):
        data = ddp.main_first(lambda: prepare(source, identity=dataset.source, data_dir=data_dir, **settings))
    return limit_training(data, dataset.train_samples)


def load_models(
    runs: Sequence[str], key: str, *, config: Config, data: DataSplits, hardware: Hardware
) -> dict[str, Classifier]:
    """The trained models of other runs, by short names (`aerl.config.compose.run_names`)."""
    models = [load_model(run, config, data, key, hardware) for run in runs]
    return dict(zip(run_names(runs), models, strict=True))


def load_model(
    run: str, config: Config, data: DataSplits, key: str = "sources", hardware: Hardware | None = None
) -> Classifier:
    """The trained model of another run (its folder, or a .pt file in it), in eval mode; by default on the CPU.

    Raises UserError under the `key` that named the run, also if it had other classes or images of another shape.
    """
    weights = checkpoint.find(run, key)
    other = of_run(run, key)
    theirs, ours = other.dataset, config.dataset
    same_classes = theirs.name == ours.name or theirs.source == ours.source
    if not same_classes or (theirs.size, theirs.channels) != (ours.size, ours.channels):
        names = [f"{d.name} (size={d.size}, channels={d.channels})".replace("None", "null") for d in (theirs, ours)]
        raise UserError(f"{key}={run}: was trained on {names[0]}, but this run uses {names[1]}; images must be alike")
    try:
        model = build_model(other, data, hardware or Hardware(torch.device("cpu")))
    except UserError as error:
        raise UserError(f"{key}={run}: {error}") from error
    _load_weights(model, weights, other.model, f"{key}={run}")
    return model.eval()


def judged_weights(config: Config, run: Path) -> Path | None:
    """The file of the weights that the finished run in a folder has judged; None for checkpoint=own."""
    if config.trainer:
        return run / "checkpoints/best.pt"
    return None if config.checkpoint in (None, "own") else checkpoint.find(config.checkpoint)


def judged_model(config: Config, path: Path | None, data: DataSplits, hardware: Hardware) -> Classifier:
    """The model of a finished run with the weights in a file, if any, in eval mode."""
    model = build_model(config, data, hardware)
    _load_weights(model, path, config.model, f"checkpoint={path}")
    if config.evaluation.withhold_normalization:
        model.withhold_normalization()
    return model.eval()


def _load_weights(model: Classifier, path: Path | None, stated: Model, what: str) -> None:
    """Load a file of weights, if any. UserError if the normalisation is neither in it nor stated."""
    carries_normalization = path is not None and checkpoint.load_weights(model, path, what.partition("=")[0])
    if not carries_normalization and None in (stated.mean, stated.std):
        raise UserError(f"{what}: has no normalisation; set model.mean=[...] model.std=[...] ([0] and [1] for none)")

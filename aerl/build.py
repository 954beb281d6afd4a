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

from aerl.attacks import AttackSpec, SampleGenerator
from aerl.config.compose import of_run, run_names
from aerl.config.schema import Config, Model
from aerl.config.targets import bind
from aerl.data import DataSplits, augment, limit_training, prepare, to_unit
from aerl.evaluation.metrics import Metric
from aerl.models import Classifier
from aerl.models.build import SIZES, build_model, build_net
from aerl.models.probe import drawn, probe
from aerl.runtime import ddp, device
from aerl.runtime.device import Hardware
from aerl.training import checkpoint
from aerl.training.loop import Adversary, Recipe, check_recipe
from aerl.types import UserError, foreign_code, is_foreign, named

log = logging.getLogger("aerl")

# What attacks and analyses that use the models of other runs are given.
_ELSEWHERE = ("load", "store")


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of; `recipe` is None where nothing is trained, `doubts` are `aerl.models.probe`'s."""

    hardware: Hardware
    data: DataSplits
    model: Classifier
    recipe: Recipe | None
    attacks: Mapping[str, AttackSpec]
    metrics: Mapping[str, Metric]
    analyses: Mapping[str, Callable[..., Any]]
    doubts: tuple[str, ...] = ()


def check(config: Config) -> Recipe | None:
    """What can be checked without data and model, which UserError names; returns the recipe, if there is one."""
    for name, spec in config.attack.items():
        attack(spec, f"attack.{name}", given=dict.fromkeys(_ELSEWHERE))
    for name, spec in config.analysis.items():
        bind(spec, f"analysis.{name}", given=dict.fromkeys(_ELSEWHERE), later=["context"])
    build_metrics(config)
    bind(config.model.net, "model.net", given=dict.fromkeys(SIZES))
    recipe = build_recipe(config)
    if recipe is None and config.checkpoint is None:
        raise UserError(
            "checkpoint=null: trainer=none needs a model: checkpoint=RUN_FOLDER, a .pt file, or checkpoint=own (the "
            "weights that model.net._target_ comes with)"
        )
    return recipe


def build(config: Config) -> Parts:
    """Raises UserError for whatever does not fit; the quickest checks come first, the data after them."""
    recipe, metrics = check(config), build_metrics(config)
    weights = checkpoint.find(config.checkpoint) if config.checkpoint not in (None, "own") else None
    machine = device.set_up(**config.hardware.model_dump())
    if recipe is not None and machine.compile:
        device.check_compiler(machine)
    data = build_data(config)
    if config.norm == "L2" and config.eps > (diagonal := math.sqrt(math.prod(data.image_shape))):
        log.warning("eps=%g: an L2 ball above %.3g holds every image of this size", config.eps, diagonal)
    if (config.evaluation.samples or 0) > len(data.test):
        raise UserError(f"evaluation.samples={config.evaluation.samples}: the test split has {len(data.test)} images")
    model = build_model(config, data, machine, 0 if recipe is None else min(recipe.batch_size, len(data.train)))
    elsewhere = {
        "load": partial(load_models, config=config, data=data, hardware=machine),
        "store": Path(config.data_dir).expanduser() / "crafted",
    }
    attacks = {name: attack(spec, f"attack.{name}", given=elsewhere) for name, spec in config.attack.items()}
    analyses = {
        name: _built(spec, f"analysis.{name}", "context", given=elsewhere) for name, spec in config.analysis.items()
    }
    for name, one in attacks.items():
        _check_settings(one.call, f"attack.{name}", model, data, machine)
    if config.checkpoint is not None:
        _load_weights(model, weights, config.model, "checkpoint", config.checkpoint)
    if recipe is not None:
        check_recipe(recipe, model, machine.device)
    untrained = drawn(model.net, build_net(config, data, "other weights")) if config.checkpoint == "own" else []
    with foreign_code(f"model={config.model.name}", model.net):
        doubts = probe(model, to_unit(data.test.images[:8].to(machine.device), machine.memory_format))
    return Parts(machine, data, model, recipe, attacks, metrics, analyses, (*untrained, *doubts))


def _check_settings(
    attack: Callable[..., Any], key: str, model: Classifier, data: DataSplits, machine: Hardware
) -> None:
    """One of aerl's attacks checks its settings against each other when it is called; here on no images at all."""
    if is_foreign(attack):
        return
    x = to_unit(data.test.images[:0].to(machine.device), machine.memory_format)
    try:
        with named(key):
            attack(model, x, data.test.labels[:0].to(machine.device), generator=SampleGenerator.for_images(x, seed=0))
    except UserError:
        raise
    except Exception as error:  # it takes no empty batch, which no evaluation gives it
        log.debug("%s: %s", key, error)


def attack(spec: Mapping[str, Any], key: str, given: Mapping[str, Any] | None = None) -> AttackSpec:
    """`attack(model, x, y, *, generator)`, a function with its settings bound or an instance of a class, resolved."""
    return AttackSpec.of(_built(spec, key, "model", "x", "y", given=given, generator=None), key)


def build_metrics(config: Config) -> dict[str, Metric]:
    """Each a function `metric(logits, labels)`, see `aerl.evaluation.metrics`."""
    return {name: _built(spec, f"metric.{name}", "logits", "labels") for name, spec in config.metric.items()}


def _built(
    spec: Mapping[str, Any], key: str, *call: str, given: Mapping[str, Any] | None = None, **keywords: None
) -> Callable[..., Any]:
    """The function that `spec` names, with settings, or an instance of the class: it takes `call` and `keywords`."""
    bound = bind(spec, key, given=given, later=[*call, *keywords])
    with named(key), foreign_code(key, bound.func):
        made = bound() if inspect.isclass(bound.func) else bound
    try:
        inspect.signature(made).bind(*call, **keywords)
    except (TypeError, ValueError) as error:
        arguments = ", ".join([*call, *(f"{name}={name}" for name in keywords)])
        raise UserError(f"{key}._target_={spec['_target_']}: cannot be called with ({arguments}): {error}") from error
    return made


def build_recipe(config: Config) -> Recipe | None:
    trainer = config.trainer
    if trainer is None:
        return None
    adversary = trainer.adversary
    if trainer.select == "val_adversarial_accuracy":
        if adversary is None:
            raise UserError(f"trainer.select={trainer.select}: needs a trainer.adversary; val_accuracy does not")
        if adversary.start_epoch >= trainer.epochs:
            raise UserError(
                f"trainer.adversary.start_epoch={adversary.start_epoch}: the adversary never joins in "
                f"{trainer.epochs} epochs, so trainer.select={trainer.select} has nothing to measure"
            )
    act = _built(trainer.act, "trainer.act", "logits", "labels", "generator")
    settings = {
        "act": act,
        "weight": adversary.weight if adversary else 0.0,
        "probability_floor": trainer.probability_floor,
    }
    return Recipe(
        epochs=trainer.epochs,
        batch_size=trainer.batch_size,
        optimizer=bind(trainer.optimizer, "trainer.optimizer", later=["params"]),
        objective=_built(
            trainer.objective, "trainer.objective", "model", "x", "y", given=settings, x_adv=None, generator=None
        ),
        schedule=trainer.schedule.kind,
        warmup=trainer.schedule.warmup,
        clip=trainer.clip,
        adversary=None
        if adversary is None
        else Adversary(
            attack(adversary.attack, "trainer.adversary.attack", given={"in_training": True}).call,  # type: ignore[arg-type]
            adversary.start_epoch,
        ),
        select=trainer.select,
        augment=partial(augment, **config.dataset.augmentation.model_dump()),
    )


def build_data(config: Config) -> DataSplits:
    dataset = config.dataset
    data_dir = Path(config.data_dir).expanduser()
    source = bind(dataset.source, "dataset.source", given={"data_dir": data_dir})
    with foreign_code("dataset.source", source):
        data = ddp.main_first(
            lambda: prepare(
                source,
                identity=dataset.source,
                data_dir=data_dir,
                name=dataset.name,
                size=dataset.size,
                channels=dataset.channels,
                val_fraction=dataset.val_fraction,
                split_seed=dataset.split_seed,
            )
        )
    return limit_training(data, dataset.train_samples)


def load_models(
    runs: Sequence[str], key: str, *, config: Config, data: DataSplits, hardware: Hardware
) -> dict[str, Classifier]:
    """The trained models of other runs on this run's hardware, by short names (aerl.config.compose.run_names)."""
    models = [load_model(run, config, data, key, hardware) for run in runs]
    return dict(zip(run_names(runs), models, strict=True))


def load_model(
    source: str,
    config: Config,
    data: DataSplits,
    key: str = "sources",
    machine: Hardware = Hardware(torch.device("cpu")),  # noqa: B008
) -> Classifier:
    """The trained model of another run (its folder, or a .pt file in it), in eval mode.

    The architecture is taken from that folder, as with `checkpoint=`. Raises UserError about the `key` that
    named it, also where that run's images were of other classes or of another shape than this one's.
    """
    weights = checkpoint.find(source, key)
    other = of_run(source, key)
    theirs, ours = other.dataset, config.dataset
    same_classes = theirs.name == ours.name or theirs.source == ours.source
    if not same_classes or (theirs.size, theirs.channels) != (ours.size, ours.channels):
        sets = [f"{d.name} (size={d.size}, channels={d.channels})".replace("None", "null") for d in (theirs, ours)]
        raise UserError(f"{key}={source}: was trained on {sets[0]}, this run is on {sets[1]}: images must be alike")
    try:
        model = build_model(other, data, machine)
    except UserError as error:
        raise UserError(f"{key}={source}: {error}") from error
    _load_weights(model, weights, other.model, key, source)
    return model.eval()


def _load_weights(model: Classifier, path: Path | None, stated: Model, key: str, value: str) -> None:
    """Load the weights, if they are in a file. UserError where their normalisation is neither there nor stated."""
    carries_normalization = path is not None and checkpoint.load_weights(model, path, key)
    if not carries_normalization and None in (stated.mean, stated.std):
        raise UserError(
            f"{key}={value}: holds weights without their normalisation; state what the model was "
            "trained with: model.mean=[...] model.std=[...], per channel of images in [0, 1] (mean 0, std 1: none)"
        )

"""From a checked configuration to the objects of a run. Nothing is written here but the dataset cache."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerl import checkpoint, distributed, hardware
from aerl.attacks import SampleGenerator
from aerl.config import Config, Model, bind, of_run, run_names
from aerl.data import DataSplits, augment, prepare, subset, to_unit
from aerl.hardware import Hardware, seed_from
from aerl.models import Classifier
from aerl.probe import drawn, probe
from aerl.train import Adversary, Recipe
from aerl.types import UserError, first_line

log = logging.getLogger("aerl")

# What attacks and analyses that take the models of other runs are told.
_ELSEWHERE = ("load", "store")
# What a network's constructor is told of the dataset, if it takes it; `size` is (height, width).
_SIZES = ("num_classes", "channels", "size")


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of.

    `recipe` is None where nothing is trained; `doubts` are what `aerl.probe` has to say about the model.
    """

    hardware: Hardware
    data: DataSplits
    model: Classifier
    recipe: Recipe | None
    attacks: Mapping[str, Callable[..., Any]]
    analyses: Mapping[str, Callable[..., Any]]
    doubts: tuple[str, ...] = ()


def check(config: Config) -> Recipe | None:
    """What can be checked without data and model, which UserError names; returns the recipe, if there is one."""
    for name, spec in config.attack.items():
        attack(spec, f"attack.{name}", given=dict.fromkeys(_ELSEWHERE))
    for name, spec in config.analysis.items():
        bind(spec, f"analysis.{name}", given=dict.fromkeys(_ELSEWHERE), later=["context"])
    bind(config.model.net, "model.net", given=dict.fromkeys(_SIZES))
    recipe = build_recipe(config)
    if recipe is None and config.checkpoint is None:
        raise UserError(
            "checkpoint=null: trainer=none needs a model to judge: checkpoint=RUN_FOLDER or a .pt file; "
            "checkpoint=own judges the weights that model.net._target_ comes with"
        )
    return recipe


def build(config: Config) -> Parts:
    """Raises UserError for whatever does not fit; the quickest checks come first, the data after them."""
    recipe = check(config)
    weights = checkpoint.find(config.checkpoint) if config.checkpoint not in (None, "own") else None
    machine = hardware.set_up(**config.hardware.model_dump())
    data = build_data(config)
    if config.norm == "L2" and config.eps > (diagonal := math.sqrt(math.prod(data.image_shape))):
        log.warning("eps=%g: an L2 ball above %.3g holds every image of this size", config.eps, diagonal)
    if (config.evaluation.samples or 0) > len(data.test):
        raise UserError(
            f"evaluation.samples={config.evaluation.samples}: the test split has {len(data.test)} images"
        )
    model = build_model(config, data)
    elsewhere = {
        "load": partial(load_models, config=config, data=data, hardware=machine),
        "store": Path(config.data_dir).expanduser() / "crafted",
    }
    attacks = {name: attack(spec, f"attack.{name}", given=elsewhere) for name, spec in config.attack.items()}
    analyses = {
        name: _made(bind(spec, f"analysis.{name}", given=elsewhere, later=["context"]), f"analysis.{name}")
        for name, spec in config.analysis.items()
    }
    nothing = torch.zeros(0, *data.image_shape)
    for name, call in attacks.items():
        # An attack checks its settings against each other when it is called; one that cannot take an empty
        # batch is none the worse for it.
        with named(f"attack.{name}"), _only(UserError):
            call(model, nothing, data.test.labels[:0], generator=SampleGenerator.for_images(nothing, seed=0))
    if config.checkpoint is not None:
        _load_weights(model, weights, config.model, "checkpoint", config.checkpoint)
    if recipe is not None:
        _optimizer(recipe, model)
    untrained = drawn(model.net, _net(config, data, "other weights")) if config.checkpoint == "own" else []
    model = machine.place(model)
    doubts = probe(model, to_unit(data.test.images[:8].to(machine.device), machine.memory_format))
    return Parts(machine, data, model, recipe, attacks, analyses, (*untrained, *doubts))


@contextmanager
def _only(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, kind):
            raise


def attack(spec: Mapping[str, Any], key: str, given: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """`attack(model, x, y, *, generator)`: a function with its settings bound, or an instance of a class."""
    return _made(bind(spec, key, given=given, later=["model", "x", "y", "generator"]), key)


def _made(bound: partial[Any], key: str) -> Callable[..., Any]:
    with named(key):
        return bound() if inspect.isclass(bound.func) else bound


@contextmanager
def named(key: str) -> Iterator[None]:
    """An attack's complaint about a setting of its own, under the key by which the user knows it."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{key}.{error}" if "=" in str(error).partition(" ")[0] else f"{key}: {error}"
        ) from error


def build_recipe(config: Config) -> Recipe | None:
    trainer = config.trainer
    if trainer is None:
        return None
    act = bind(trainer.act, "trainer.act", later=["logits", "labels", "generator"])
    adversary = trainer.adversary
    if trainer.select == "val_adversarial_accuracy":
        if adversary is None:
            raise UserError(
                f"trainer.select={trainer.select}: needs a trainer.adversary; val_accuracy does not"
            )
        if adversary.start_epoch >= trainer.epochs:
            raise UserError(
                f"trainer.adversary.start_epoch={adversary.start_epoch}: the adversary never joins in "
                f"{trainer.epochs} epochs, so trainer.select={trainer.select} has nothing to measure"
            )
    return Recipe(
        epochs=trainer.epochs,
        batch_size=trainer.batch_size,
        optimizer=bind(trainer.optimizer, "trainer.optimizer", later=["params"]),
        act=act() if inspect.isclass(act.func) else act,
        schedule=trainer.schedule.kind,
        warmup=trainer.schedule.warmup,
        clip=trainer.clip,
        probability_floor=trainer.probability_floor,
        adversary=None
        if adversary is None
        else Adversary(
            attack(adversary.attack, "trainer.adversary.attack"),
            adversary.weight,
            adversary.start_epoch,
            adversary.objective,
        ),
        select=trainer.select,
        augment=partial(augment, **config.dataset.augmentation.model_dump()),
    )


def build_data(config: Config) -> DataSplits:
    dataset = config.dataset
    data_dir = Path(config.data_dir).expanduser()
    data = distributed.main_first(
        lambda: prepare(
            bind(dataset.source, "dataset.source", given={"data_dir": data_dir}),
            identity=dataset.source,
            data_dir=data_dir,
            name=dataset.name,
            size=dataset.size,
            channels=dataset.channels,
            val_fraction=dataset.val_fraction,
            split_seed=dataset.split_seed,
        )
    )
    if (samples := dataset.train_samples) is None:
        return data
    if samples > len(data.train):
        raise UserError(f"dataset.train_samples={samples}: the training split has {len(data.train)} images")
    return replace(data, train=subset(data.train, samples))


def build_model(config: Config, data: DataSplits) -> Classifier:
    """The network, initialised from the run's seed, behind its normalisation; tried on two images."""
    net = _net(config, data, config.seed, "weights")
    mean, std = (
        _per_channel(stated, own, data.image_shape[0], key)
        for stated, own, key in ((config.model.mean, data.mean, "mean"), (config.model.std, data.std, "std"))
    )
    model = Classifier(net, mean, std)
    _try(model, config.model.name, data)
    return model


def _net(config: Config, data: DataSplits, *words: int | str) -> nn.Module:
    """The bare network, its random weights drawn from a seed of `words`."""
    channels, height, width = data.image_shape
    sizes = dict(zip(_SIZES, (data.num_classes, channels, (height, width)), strict=True))
    torch.manual_seed(seed_from(*words))
    make = bind(config.model.net, "model.net", given=sizes)
    try:
        net = make()
    except UserError:
        raise
    except Exception as error:  # another library's constructor can raise anything
        raise UserError(
            f"model.net: {_call(make)} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(net, nn.Module):
        raise UserError(
            f"model.net._target_={config.model.net['_target_']}: gave a {type(net).__name__}, not a module"
        )
    return net


def _call(bound: partial[Any]) -> str:
    """A bound target as the call that it makes, for a reader."""
    settings = ", ".join(f"{name}={value!r}" for name, value in bound.keywords.items())
    return f"{getattr(bound.func, '__name__', bound.func)}({settings})"


def load_models(
    runs: Sequence[str], key: str, *, config: Config, data: DataSplits, hardware: Hardware
) -> dict[str, Classifier]:
    """The trained models of other runs on this run's hardware, each under a short name (config.run_names)."""
    models = [hardware.place(load_model(run, config, data, key)) for run in runs]
    return dict(zip(run_names(runs), models, strict=True))


def load_model(source: str, config: Config, data: DataSplits, key: str = "sources") -> Classifier:
    """The trained model of another run (its folder, or a .pt file in it), in eval mode.

    The architecture is taken from that folder, as with `checkpoint=`. Raises UserError about the `key` that
    named it, also where that run's images were of other classes or of another shape than this one's.
    """
    weights = checkpoint.find(source, key)
    other = of_run(source, key)
    theirs, ours = other.dataset, config.dataset
    same_classes = theirs.name == ours.name or theirs.source == ours.source
    if not same_classes or (theirs.size, theirs.channels) != (ours.size, ours.channels):
        told = [
            f"{d.name} (size={d.size}, channels={d.channels})".replace("None", "null") for d in (theirs, ours)
        ]
        raise UserError(
            f"{key}={source}: was trained on {told[0]}, this run is on {told[1]}; "
            "classes and image shape must be the same"
        )
    try:
        model = build_model(other, data)
    except UserError as error:
        raise UserError(f"{key}={source}: {error}") from error
    _load_weights(model, weights, other.model, key, source)
    return model.eval()


def _load_weights(model: Classifier, path: Path | None, stated: Model, key: str, value: str) -> None:
    """Load the weights, if they are in a file, and make sure that somebody has said their normalisation."""
    carries_normalization = path is not None and checkpoint.load_weights(model, path, key)
    if not carries_normalization and None in (stated.mean, stated.std):
        raise UserError(
            f"{key}={value}: holds weights without their normalisation; state what the model was "
            "trained with: model.mean=[...] model.std=[...], per channel of images in [0, 1] (mean 0, std 1: none)"
        )


def _per_channel(stated: list[float] | None, own: tuple[float, ...], channels: int, key: str) -> list[float]:
    values = list(own) if stated is None else stated
    if len(values) not in (1, channels):
        raise UserError(f"model.{key}={values}: the images have {channels} channels; give one value for each")
    # A channel that never varies has no scale of its own.
    return [value or 1.0 for value in values] if key == "std" else values


def _try(model: Classifier, name: str, data: DataSplits) -> None:
    shape = "x".join(map(str, data.image_shape))
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval().net(model.normalize(torch.zeros(2, *data.image_shape)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"model={name}: does not take {shape} images ({first_line(error)}); dataset.size= resizes them, "
            "model.net.resize=224 lets torchvision's networks do so themselves"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"model={name}: gives a {type(logits).__name__}, not a tensor of logits (images, classes)"
        )
    if logits.shape != (2, data.num_classes):
        raise UserError(
            f"model={name}: gives outputs of shape {tuple(logits.shape[1:])} for {data.num_classes} classes"
        )


def _optimizer(recipe: Recipe, model: nn.Module) -> None:
    """Build one in vain: torch checks its own settings, and only here can that be said before training."""
    try:
        recipe.optimizer(model.parameters())
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer.optimizer: {error}") from error

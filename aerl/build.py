"""From a checked configuration to the objects of a run. Nothing is written here but the dataset cache."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from aerl.attacks import AttackSpec, SampleGenerator, attacking, evaluating
from aerl.config.compose import of_run, run_names
from aerl.config.schema import Config, Model
from aerl.config.targets import bind
from aerl.data import DataSplits, augment, limit_training, prepare, to_unit
from aerl.evaluation.metrics import Metric
from aerl.evaluation.probe import drawn, keeping_buffers, probe
from aerl.models import Classifier
from aerl.runtime import ddp, device
from aerl.runtime.device import Hardware, seed_from
from aerl.training import checkpoint
from aerl.training.loop import Adversary, Recipe, check_recipe
from aerl.types import UserError, foreign_code, is_foreign, named

log = logging.getLogger("aerl")

# What attacks and analyses that take the models of other runs are told.
_ELSEWHERE = ("load", "store")
# What a network's constructor is told of the dataset, if it takes it; `size` is (height, width).
_SIZES = ("num_classes", "channels", "size")


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of.

    `recipe` is None where nothing is trained; `doubts` are what `aerl.evaluation.probe` has to say about the model.
    """

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
    nothing = to_unit(data.test.images[:0].to(machine.device), machine.memory_format)
    for name, spec in attacks.items():
        # An attack checks its settings against each other when it is called; one that cannot take an empty
        # batch is none the worse for it, and what one of others does to the model is not looked at here.
        if is_foreign(spec.call):
            continue
        with named(f"attack.{name}"), _only(UserError):
            no_labels = data.test.labels[:0].to(machine.device)
            spec.call(model, nothing, no_labels, generator=SampleGenerator.for_images(nothing, seed=0))
    if config.checkpoint is not None:
        _load_weights(model, weights, config.model, "checkpoint", config.checkpoint)
    if recipe is not None:
        check_recipe(recipe, model, machine.device)
    untrained = drawn(model.net, _net(config, data, "other weights")) if config.checkpoint == "own" else []
    with foreign_code(f"model={config.model.name}", model.net):
        doubts = probe(model, to_unit(data.test.images[:8].to(machine.device), machine.memory_format))
    return Parts(machine, data, model, recipe, attacks, metrics, analyses, (*untrained, *doubts))


@contextmanager
def _only(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, kind):
            raise


def attack(spec: Mapping[str, Any], key: str, given: Mapping[str, Any] | None = None) -> AttackSpec:
    """`attack(model, x, y, *, generator)`, a function with its settings bound or an instance of a class, resolved."""
    return AttackSpec.of(_built(spec, key, "model", "x", "y", given=given, generator=None), key)


def build_metrics(config: Config) -> dict[str, Metric]:
    """Each a function `metric(logits, labels)`, see `aerl.evaluation.metrics`."""
    return {name: _built(spec, f"metric.{name}", "logits", "labels") for name, spec in config.metric.items()}


def _built(
    spec: Mapping[str, Any], key: str, *call: str, given: Mapping[str, Any] | None = None, **keywords: None
) -> Callable[..., Any]:
    """What `spec` names, with its settings bound, or an instance if it is a class: a function of `call` and
    `keywords`."""
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
    return Recipe(
        epochs=trainer.epochs,
        batch_size=trainer.batch_size,
        optimizer=bind(trainer.optimizer, "trainer.optimizer", later=["params"]),
        act=_built(trainer.act, "trainer.act", "logits", "labels", "generator"),
        schedule=trainer.schedule.kind,
        warmup=trainer.schedule.warmup,
        clip=trainer.clip,
        probability_floor=trainer.probability_floor,
        adversary=None
        if adversary is None
        else Adversary(
            attack(adversary.attack, "trainer.adversary.attack").call,  # type: ignore[arg-type]
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


def build_model(config: Config, data: DataSplits, machine: Hardware, batch: int = 0) -> Classifier:
    """The network, initialised from the run's seed, behind its normalisation, where the run computes; tried there.

    `batch` is how many images a step of training takes; 0 where nothing is trained.
    """
    net = _net(config, data, config.seed, "weights")
    mean, std = (
        _per_channel(stated, own, data.image_shape[0], key)
        for stated, own, key in ((config.model.mean, data.mean, "mean"), (config.model.std, data.std, "std"))
    )
    model = Classifier(net, mean, std)
    _place(model, f"model={config.model.name}", data, machine, batch)
    return model


def _net(config: Config, data: DataSplits, *words: int | str) -> nn.Module:
    """The bare network, its random weights drawn from a seed of `words`."""
    channels, height, width = data.image_shape
    sizes = dict(zip(_SIZES, (data.num_classes, channels, (height, width)), strict=True))
    torch.manual_seed(seed_from(*words))
    make = bind(config.model.net, "model.net", given=sizes)
    with foreign_code(f"model.net: {_call(make)}"):
        net = make()
    if not isinstance(net, nn.Module):
        raise UserError(f"model.net._target_={config.model.net['_target_']}: gave a {type(net).__name__}, not a module")
    if any(map(is_lazy, net.parameters())):  # they get their shapes and values from a first batch
        with foreign_code("model.net"), evaluating(net), torch.no_grad():
            net(torch.zeros(2, *data.image_shape))
    return net


def _call(bound: partial[Any]) -> str:
    """A bound target as the call that it makes, for a reader."""
    settings = ", ".join(f"{name}={value!r}" for name, value in bound.keywords.items())
    return f"{getattr(bound.func, '__name__', bound.func)}({settings})"


def load_models(
    runs: Sequence[str], key: str, *, config: Config, data: DataSplits, hardware: Hardware
) -> dict[str, Classifier]:
    """The trained models of other runs on this run's hardware, each under a short name (config.run_names)."""
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
        told = [f"{d.name} (size={d.size}, channels={d.channels})".replace("None", "null") for d in (theirs, ours)]
        raise UserError(
            f"{key}={source}: was trained on {told[0]}, this run is on {told[1]}; "
            "classes and image shape must be the same"
        )
    try:
        model = build_model(other, data, machine)
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


def _place(model: Classifier, key: str, data: DataSplits, machine: Hardware, batch: int) -> None:
    """Move `model` to where the run computes, and try there what will be asked of it.

    One that cannot compute on channels_last images, as hardware.channels_last gives them, gets contiguous ones.
    """
    with foreign_code(key, remedy=f"moved to {machine.device}"):
        machine.place(model)
    try:
        _try(model, key, data, machine, batch)
    except UserError as error:
        if not machine.channels_last:
            raise
        model.contiguous = True
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        _try(model, key, data, machine, batch)
        log.warning("%s; it computes in the contiguous layout instead of hardware.channels_last=true", error)


def _try(model: Classifier, key: str, data: DataSplits, machine: Hardware, batch: int) -> None:
    """Two images, a single one, and with a `batch` a step of training without the step; UserError if one fails."""
    shape = "x".join(map(str, data.image_shape))
    blank = torch.zeros(2, *data.image_shape, dtype=torch.uint8, device=machine.device)
    images = to_unit(blank, machine.memory_format)
    with torch.random.fork_rng([machine.device] if images.is_cuda else []), keeping_buffers(model):
        remedy = (
            f"given 2 images of {shape}; dataset.size= resizes them, model.net.resize=224 lets torchvision's networks "
            "do so themselves"
        )
        with attacking(model), torch.no_grad():
            with foreign_code(key, remedy=remedy):
                classes = model(images).shape[1]
            with foreign_code(key, remedy="given a single image, as attacks end on one; squeeze() drops its dimension"):
                model(images[:1])
        if classes != data.num_classes:
            raise UserError(f"{key}: gives {classes} logits for {data.num_classes} classes")
        if not batch:
            return
        # On a GPU, BatchNorm sees the whole batch of all processes.
        each = batch if images.is_cuda else max(1, batch // ddp.world_size())
        remedy = f"given a batch of {min(2, each)} in training mode, where BatchNorm needs trainer.batch_size=2 or more"
        with evaluating(model), foreign_code(key, remedy=remedy):
            model.train()
            with machine.autocast():
                logits = model(images[:each])
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not (learning and logits.requires_grad):
                raise UserError(f"{key}: its logits do not depend on a parameter that learns: it cannot be trained")
            torch.autograd.grad(logits.sum(), learning, allow_unused=True)

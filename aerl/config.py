"""The schema: every key, its type, its bounds; and every error about them in one line.

YAML files compose freely. What comes out is checked here, twice and before anything is computed or
written: the fixed sections against the classes below, and each `_target_` against the signature of what
it names. A new attack, model or dataset is therefore checked without being listed anywhere.
"""

import difflib
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from hydra import compose
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from aerl.remote import local
from aerl.results import read_config, read_summary
from aerl.terminal import memory_line, override_word
from aerl.types import (
    Count,
    Index,
    NonNegative,
    Norm,
    Number,
    Positive,
    Probability,
    UserError,
    finite,
    first_line,
    quotient,
    shortened,
)


def _names_its_target(spec: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(spec.get("_target_"), str):
        raise ValueError("needs a _target_: the dotted name of a function or class")
    return spec


Setting = Annotated[Any, AfterValidator(quotient), AfterValidator(finite)]
Target = Annotated[dict[str, Setting], AfterValidator(_names_its_target)]


def _below(name: str) -> str:
    """It becomes part of a run folder's path, which overwrite=true discards."""
    path = Path(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise ValueError("must be the name of a folder below runs_dir")
    for part in path.parts:
        if part[0] in "-~" or part[-1] in ". ":
            raise ValueError(
                "must be the name of a folder; it begins with - or ~, or ends with a dot or a space"
            )
        if len(part.encode()) > _LONGEST_NAME:
            raise ValueError(f"must be the name of a folder, of at most {_LONGEST_NAME} bytes")
    return name


_LONGEST_NAME = 255  # bytes; of Linux's file systems


Name = Annotated[str, AfterValidator(_below)]
Folder = Annotated[str, Field(min_length=1)]


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
    objective: Literal["added", "alone", "kl"]
    attack: Target


class Trainer(Section):
    name: Name
    epochs: Count
    batch_size: Count
    optimizer: Target
    schedule: Schedule
    clip: Positive | None
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
    threads: Annotated[Count, Field(le=1024)] | None
    deterministic: bool
    distributed: bool


class Logger(Section):
    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[
        str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]*$")
    ]  # as W&B takes them
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
    analysis: dict[str, Target]
    evaluation: Evaluation
    hardware: Hardware
    logger: Logger

    @property
    def trainer_name(self) -> str:
        return "none" if self.trainer is None else self.trainer.name


def read(cfg: DictConfig) -> Config:
    """The composed YAML as a checked Config; UserError names the first key that is wrong."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_omegaconf_line(error)) from error
    for key, text in _texts(container):
        if _UNPRINTABLE.search(text):
            raise UserError(
                f"{key}={_short(text)}: has a control character, or a byte that is no text in this locale"
            )
    try:
        config = Config.model_validate(container)
    except ValidationError as error:
        raise UserError(_pydantic_line(error)) from error
    _check_radius("eps", config.norm, config.eps)
    attacks = {f"attack.{name}": spec for name, spec in config.attack.items()}
    if config.trainer and config.trainer.adversary:
        attacks["trainer.adversary.attack"] = config.trainer.adversary.attack
    for key, spec in attacks.items():
        _check_radius(f"{key}.eps", spec.get("norm"), spec.get("eps"))
    return config


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a configuration, with its key; of lists also the items, of dictionaries also the keys."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield key, str(name)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item, key)


def _check_radius(key: str, norm: Any, eps: Any) -> None:
    if norm == "Linf" and isinstance(eps, int | float) and eps > 1:
        right = f"{eps:g}/255?" if 1 < eps <= 255 else "8/255?"
        raise UserError(
            f"{key}={_short(eps)}: pixels are in [0, 1], so an Linf ball above 1 holds every image; {right}"
        )


# Keys that change where a run is kept or how fast it goes, never its numbers.
NOT_IDENTITY = ("runs_dir", "data_dir", "name", "overwrite", "prepare_data_only", "logger")


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that determines a run's numbers."""
    return _identifying(config.model_dump())


def _identifying(config: Mapping[Any, Any]) -> dict[str, Any]:
    def counts(key: str, value: Any) -> bool:
        # These came later: runs made before them are still the same runs.
        return (key, value) not in (("evaluation.batch_size", None), ("hardware.distributed", False))

    return {
        name: {key: value for key, value in part.items() if counts(f"{name}.{key}", value)}
        if isinstance(part, Mapping)
        else part
        for name, part in config.items()
        if name not in NOT_IDENTITY
    }


def config_hash(config: Config) -> str:
    """Equal for two configurations if and only if they mean the same run."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Told by the path already, or by what it sets.
_NOT_IN_THE_NAME = ("dataset", "model", "trainer", "seed", "multirun_sweeps")


def telling(overrides: Collection[str]) -> list[str]:
    """The overrides that tell a run from its neighbours of the same dataset, model, trainer and seed."""
    words = sorted(override.lstrip("+~") for override in overrides)
    keys = [word.partition("=")[0] for word in words]
    return [
        word
        for word, key in zip(words, keys, strict=True)
        if key not in _NOT_IN_THE_NAME and key.partition(".")[0] not in NOT_IDENTITY
    ]


def run_name(config: Config, overrides: Collection[str]) -> str:
    """Where under `runs_dir` a run is kept: dataset/model/trainer/what else was overridden/seed.

    Named by identity, not by the clock, so that the same command finds its own folder again.
    """
    name = f"{_place(config, overrides)}/seed{config.seed}" if config.name is None else config.name
    folder = Path(config.runs_dir).expanduser().absolute() / name
    if len(os.fsencode(folder)) > _LONGEST_PATH:
        key, value = ("runs_dir", config.runs_dir) if config.name is None else ("name", config.name)
        raise UserError(
            f"{key}={_short(value)}: the run folder's path would be longer than {_LONGEST_PATH} bytes"
        )
    return name


_LONGEST_PATH = 4096 - 512  # bytes: Linux's own limit less room for the files in a run folder


def group_name(config: Config, overrides: Collection[str]) -> str:
    """What a run has in common with its repetitions: its name without the seed, nor those of runs it takes."""
    return _place(config, [re.sub(r"\bseed\d+\b", "seed", override) for override in overrides])


def _place(config: Config, overrides: Collection[str]) -> str:
    words = _file_name(telling(overrides)) or "default"
    return f"{config.dataset.name}/{config.model.name}/{config.trainer_name}/{words}"


def sweep_name(overrides: Collection[str]) -> str:
    """Where under `runs_dir` the table of a multirun is kept, so that the same command finds it again."""
    words = sorted(overrides)
    kept = [word for word in words if re.split(r"[=.]", word.lstrip("+~"))[0] not in NOT_IDENTITY]
    return f"multirun/{_file_name(kept) or 'default'}"


# What of Hydra's own configuration has an effect here; aerl keeps its run folders and its log by itself.
_HYDRA_KEYS = (
    "launcher",
    "sweeper",
    "callbacks",
    "mode",
    "searchpath",
    "sweep.dir",
    "job.env_set",
    "job.env_copy",
)


def check_overrides(cfg: DictConfig) -> None:
    """UserError for an override that Hydra would take without a word, and that would have no effect."""
    from hydra.core.global_hydra import GlobalHydra

    for word in [*cfg.hydra.overrides.hydra, *cfg.hydra.overrides.task]:
        key, _, value = word.lstrip("+~").partition("=")
        inside = re.sub(r"^hydra[./]", "", key)
        if inside != key and not inside.startswith(_HYDRA_KEYS):
            raise UserError(
                f"{key}={_short(value)}: has no effect here; of Hydra's keys {', '.join(_HYDRA_KEYS)} have"
            )
        if key == "recipe" and value != "null":
            options = GlobalHydra.instance().config_loader().get_group_options("recipe")
            for name in value.strip("[]").split(","):
                if name not in options:
                    raise UserError(f"recipe={_short(name)}: no such option; {_suggest(name, options)}")


def sweep_jobs(cfg: DictConfig) -> list[list[str]] | None:
    """The overrides of every job that a multirun is going to have; None where its sweeper finds them as it goes."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not cfg.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    words = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*words, *cfg.hydra.overrides.task])
    try:
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException:  # which the sweeper is about to raise itself
        return None
    if not jobs:
        raise UserError(
            f"{' '.join(words + cfg.hydra.overrides.task)}: means no job at all; a list of values is empty"
        )
    return jobs


def check_jobs(cfg: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Compose and check every job of a multirun before its first begins; UserError names the first wrong one."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from aerl.build import check

    loader, before = GlobalHydra.instance().config_loader(), HydraConfig.instance().cfg
    for number, words in enumerate(jobs):
        try:
            job = loader.load_sweep_config(cfg, list(words))
            with flag_override(job, ["struct", "readonly"], [False, False]):
                job.hydra.job.id = job.hydra.job.num = number
                HydraConfig.instance().set_config(job)
                del job["hydra"]
            check(read(job))
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            raise UserError(f"{line} (job {number} of {len(jobs)}: {' '.join(words)})") from error
    HydraConfig.instance().cfg = before
    # Hydra's own check would compose each of them once more.
    BasicSweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]


def _file_name(words: Collection[str]) -> str:
    return shortened(re.sub(r"[^\w.=,+-]+", "_", ",".join(words)).strip("_,"), 120)  # file systems end at 255


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def difference(config: Config, folder: Path) -> str:
    """The first keys in which the configuration kept in a run folder differs from this one, for a reader."""
    try:
        kept = read_config(folder)
    except UserError as error:
        return str(error)
    here = dict(_leaves(identity(config)))
    there = dict(_leaves(_identifying(kept)))
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    told = [f"{key} is {_short(there.get(key))} there, {_short(here.get(key))} here" for key in differing[:2]]
    return "; ".join([*told, f"{len(differing) - 2} more"] if len(differing) > 2 else told)


def bind(
    spec: Mapping[str, Any], key: str, *, given: Mapping[str, Any] | None = None, later: Collection[str] = ()
) -> functools.partial[Any]:
    """What `spec["_target_"]` names, with the other keys bound to its parameters.

    The values are checked against the annotations of its signature. `given` are values that aerl knows,
    bound where the signature takes them, and of them `num_classes`, which every library calls so, also where
    it takes any keyword; `later` names the parameters that the caller will pass. Raises
    UserError for a target that cannot be imported, a key it does not take, a value of the wrong type or
    out of range, and a parameter that is nowhere given.
    """
    target = _locate(spec["_target_"], key)
    try:
        parameters = inspect.signature(target).parameters
    except ValueError as error:  # written in C
        raise UserError(f"{key}._target_={spec['_target_']}: its parameters cannot be read") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # a library whose annotations exist for type checkers only
        hints = {}
    reserved = {*(given or {}), *later}
    settings = {name: value for name, value in spec.items() if name != "_target_"}
    for name, value in settings.items():
        if name in reserved or not (name in parameters or takes_any):
            known = [p for p in parameters if p not in reserved]
            raise UserError(f"{key}.{name}={_short(value)}: no such key; {_suggest(name, known)}")
        if name in hints:
            settings[name] = _checked(value, hints[name], f"{key}.{name}")
    for name, value in (given or {}).items():
        if name in parameters or (takes_any and name == "num_classes"):
            settings[name] = value
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and name not in {*settings, *later}:
            raise UserError(f"{key}.{name}: missing; {spec['_target_']} needs it")
    return functools.partial(target, **settings)


def _locate(name: str, key: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"{key}._target_={name}: cannot be imported: {first_line(error)}") from error
    if not callable(target):
        raise UserError(f"{key}._target_={name}: is a {type(target).__name__}, not a function or class")
    return target  # type: ignore[no-any-return]


def _checked(value: Any, hint: Any, key: str) -> Any:
    try:
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            return hint.model_validate(value)
        checked = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        if type(checked) in (int, float):
            TypeAdapter(Number).validate_python(value)  # also where the annotation is a bare float
        return finite(checked)
    except PydanticUserError:
        return value  # an annotation that pydantic does not understand; the target judges for itself
    except ValidationError as error:
        if any(part["type"] in ("is_instance_of", "enum") for part in error.errors()):
            return value  # YAML has no such objects: the target takes a name for one, or refuses it itself
        raise UserError(_pydantic_line(error, key)) from error
    except ValueError as error:
        raise UserError(f"{key}={_short(value)}: {error}") from error


def _suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    listing = ", ".join(sorted(known)) or "none"
    return (f"did you mean {close[0]}? " if close else "") + f"known: {listing}"


def _pydantic_line(error: ValidationError, prefix: str = "") -> str:
    """The first of pydantic's complaints as `key=value: what would be right`."""
    first, *others = error.errors()
    words = [str(word) for word in first["loc"] if not str(word).startswith(("function-", "constrained-"))]
    key = _short(".".join(word for word in [prefix, *words] if word))
    more = f" (and {len(others)} more)" if others and not prefix else ""
    if first["type"] == "extra_forbidden":
        return f"{key}={_short(first['input'])}: no such key; {_suggest(words[-1], _siblings(words))}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; it can be set (trainer, attack and analysis to none) but not deleted{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}={_short(first['input'])}: {message}{more}"


def _siblings(words: list[str]) -> list[str]:
    section: Any = Config
    for word in words[:-1]:
        hint = section.model_fields[word].annotation
        section = next((t for t in getattr(hint, "__args__", [hint]) if hasattr(t, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)


def _short(value: Any) -> str:
    try:
        text = "null" if value is None else str(value)
    except ValueError:  # Python refuses to write a number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


_NORMALIZATION = (
    "what the network was trained with, per channel of images in [0, 1], for example model.mean=[0.5] "
    "model.std=[0.25]; one that normalises inside itself says model.mean=[0] model.std=[1]"
)
_TO_GIVE = {
    "model.mean": _NORMALIZATION,
    "model.std": _NORMALIZATION,
    "model.net._target_": "the network's function or class, for example torchvision.models.resnet18",
    "analysis.compare.runs": "the run folders to compare with, for example 'analysis.compare.runs=[FOLDER]'",
}


def _omegaconf_line(error: OmegaConfBaseException) -> str:
    key = error.full_key
    if "MissingMandatoryValue" in type(error).__name__ or "Missing mandatory value" in str(error):
        return f"{key}: must be given, {_TO_GIVE.get(str(key), f'for example {key}=...')}"
    message = str(error.msg or error).splitlines()[0]
    return f"{key}: {message}" if key else message


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a fault of aerl's own."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf_line(error)
    if line := memory_line(error):
        return line
    if type(error).__module__.startswith(("submitit.", "joblib.")):
        return _launcher_line(error)
    text = " ".join(str(error).split())
    if "Could not determine home directory" in text:  # pathlib, without HOME and a user's name
        return (
            "data_dir: this user has no home folder, so that ~ means nothing; data_dir=DIR, or the environment "
            "variable AERL_DATA, says where prepared data go"
        )
    if "Config group override must be a string" in text:
        return f"a group takes the name of an option, or a list of names ({text})"
    if not isinstance(error, HydraException):
        return None
    if "'${dataset}_${trainer}'" in text:
        return (
            "dataset, trainer: each takes one option, not a list; -m trainer=sl,rl runs each of several, "
            "trainer=none trains nothing"
        )
    if isinstance(error, OverrideParseException):
        return _unparsed(str(error.override))
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: no such option; {_suggest(option, error.options)}"
    if match := re.search(r"Could not load 'hydra/launcher/(\w+)'", text):  # what one of ours builds on
        ours, extra = _EXTRAS[match[1]]
        return f"hydra/launcher={ours}: needs the extra {extra}: pip install -e '.[{extra}]'"
    if match := re.search(r"Could not load '(?:.*/)?(\w+)/([^/']+)'", text):  # one option of a list
        options = [path.stem for path in Path(os.environ["AERL_ROOT"], "conf", match[1]).glob("*.yaml")]
        return f"{match[1]}={match[2]}: no such option; {_suggest(match[2], options)}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values; -m runs each of them, [a,b] makes them a list, 'a,b' one text"
    cause = error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_override(match[1], cause)
    return f"{text} {_omegaconf_line(cause)}".strip()


def _unparsed(word: str) -> str:
    """What Hydra's grammar cannot read, and how it would: a path of a run folder, for example, has = and commas."""
    key, _, value = word.partition("=")
    text = f"{_short(key)}={_short(value)}" if "=" in word else _short(word)
    if _UNPRINTABLE.search(word):
        return f"{text}: has a control character, or a byte that is no text in this locale"
    if re.fullmatch(r"\+{0,2}[a-z][\w./@]*", key) and value and not re.search(r"['\"\[\]{}]", value):
        return f"{text}: needs quotes around its special characters: {override_word(key, value)}"
    return f"{text}: is not an override; expected key=value, in quotes if it has spaces or brackets"


# Our option of hydra/launcher over each of Hydra's, and the extra that brings that.
_EXTRAS = {"joblib": ("gpus", "joblib"), "submitit_slurm": ("slurm", "slurm")}


def _launcher_line(error: BaseException) -> str:
    """What a launcher says of a job that it could not start, or that ended without an answer."""
    name, text = type(error).__name__, str(error)
    if name == "TerminatedWorkerError":
        return "a worker was killed, for want of memory perhaps, and the others with it; the same command goes on"
    if match := re.search(r"^Job (\S+) .* with path (.+)/[^/]+$", text, re.MULTILINE):
        return f"job {match[1]} ended without a result; its output is in {match[2]}, and the same command goes on"
    return " ".join(text.split())


def _unknown_override(key: str, cause: OmegaConfBaseException) -> str:
    parent, leaf = cause.parent_node, str(cause.key)
    known = [str(name) for name in parent if name != "hydra"] if isinstance(parent, DictConfig) else []
    if known == ["_target_"]:
        return f"{key}: not in the YAML file; +{key}=... gives it to what {key.rpartition('.')[0]}._target_ names"
    if not known:
        return f"{key}: no such key; {key.rpartition('.')[0]} is null here"
    return f"{key}: no such key; {_suggest(leaf, known)}"


def adopt(cfg: DictConfig, overrides: Collection[str]) -> DictConfig:
    """With trainer=none and the checkpoint of a run: that run's dataset and model, unless chosen here."""
    if cfg.trainer is not None or cfg.checkpoint in (None, "own") or OmegaConf.is_config(cfg.checkpoint):
        return cfg
    chosen = {override.lstrip("+~").partition("=")[0] for override in overrides}
    groups = [group for group in ("dataset", "model") if group not in chosen]
    folder = _run_folder(str(cfg.checkpoint))
    if not groups or folder is None:
        return cfg
    try:
        return _taken_from(folder, groups, overrides)
    except UserError as error:
        raise UserError(
            f"checkpoint={cfg.checkpoint}: {error}; state dataset= and model= on the command line"
        ) from error


def of_run(run: str, key: str) -> Config:
    """A configuration with the dataset and the model of another run (its folder, or a .pt file in it).

    The rest is at its default. Raises UserError, under the `key` that named the run.
    """
    try:
        folder = _run_folder(run)
        if folder is None:
            raise UserError("no run folder, nor a .pt file in one: there is no config.yaml and summary.json")
        return read(_taken_from(folder, ["dataset", "model"], []))
    except UserError as error:
        raise UserError(f"{key}={run}: {error}") from error


def origin(checkpoint: str | None) -> dict[str, Any] | None:
    """Which run the judged model comes from: its `folder`, `run_id`, `trainer` and `seed`; None if from none."""
    folder = None if checkpoint in (None, "own") else _run_folder(checkpoint)
    if folder is None:
        return None
    told = read_summary(folder) or {}
    trained = told.get("origin") or told  # a run that judges may itself have judged another one's model
    return {"folder": str(folder)} | {key: trained.get(key) for key in ("run_id", "trainer", "seed")}


def run_names(runs: Sequence[str]) -> list[str]:
    """A short name for each of these runs, of [a-z0-9_.-]: the shortest that tells them all apart.

    Trainer and seed (rl_seed0), with the model before (cnn_rl_seed0), the folder's name, that with its
    parent's, or else trainer, seed and a number.
    """
    candidates = []
    for run in runs:
        folder = _run_folder(run) or Path(run)
        summary = read_summary(folder) or {}
        short = f"{summary.get('trainer')}_seed{summary.get('seed')}"
        place = folder.resolve()
        names = [short, f"{summary.get('model')}_{short}", place.name, f"{place.parent.name}_{place.name}"]
        candidates.append([re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-") for name in names])
    for alike in zip(*candidates, strict=True):
        if len(set(alike)) == len(alike):
            return list(alike)
    return [f"{names[0]}_{number}" for number, names in enumerate(candidates, start=1)]


def _run_folder(checkpoint: str) -> Path | None:
    path = local(checkpoint)
    folder = path.parent.parent if path.is_file() else path
    return folder if all((folder / name).is_file() for name in ("config.yaml", "summary.json")) else None


def _taken_from(folder: Path, groups: Collection[str], overrides: Collection[str]) -> DictConfig:
    """The command line's configuration with these groups (dataset, model) as a run folder has them.

    Only names of our own config groups and plain values are taken from the run folder. What its files
    name as code to import is compared with ours and refused where it differs.
    """
    try:
        options = (read_summary(folder) or {})["choices"]
        saved = read_config(folder)
        wanted = [f"{group}={options[group]}" for group in groups]
        values = {group: dict(_leaves(saved[group])) for group in groups}  # type: ignore[index, call-overload]
        if not all(re.fullmatch(r"\w+=[\w-]+", word) for word in wanted):
            raise ValueError(f"{wanted} is no choice of options")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"its config.yaml or summary.json is damaged ({first_line(error)})") from error
    chosen = {override.lstrip("+~").partition("=")[0] for override in overrides}
    taken = compose("config", overrides=[*wanted, *overrides])
    for group in groups:
        for key, value in values[group].items():
            path = f"{group}.{key}"
            here = OmegaConf.select(taken, path, default=None)
            if path in chosen or value == here:
                continue
            # A key is plain names joined by dots: OmegaConf would also understand net[_target_].
            plain = re.fullmatch(r"[\w.-]+", key) and "${" not in str(value)
            if not plain or key.rpartition(".")[2] == "_target_":
                raise UserError(
                    f"its config.yaml says {path}={_short(value)}, which is not taken from a run folder"
                )
            try:
                OmegaConf.update(taken, path, value, force_add=False)
            except OmegaConfBaseException as error:
                raise UserError(f"its config.yaml says {path}={_short(value)}, a key unknown here") from error
    return taken

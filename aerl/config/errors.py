"""Errors of the configuration in one line: the key, the value, what would be right."""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    ValidationError,
)

from aerl.config.schema import Config
from aerl.runtime.terminal import memory_line, override_word
from aerl.types import (
    UserError,
)


def suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    listing = ", ".join(sorted(known)) or "none"
    return (f"did you mean {close[0]}? " if close else "") + f"known: {listing}"


def pydantic_line(error: ValidationError, prefix: str = "") -> str:
    """The first of pydantic's complaints as `key=value: what would be right`."""
    first, *others = error.errors()
    words = [str(word) for word in first["loc"] if not str(word).startswith(("function-", "constrained-"))]
    key = short(".".join(word for word in [prefix, *words] if word))
    more = f" (and {len(others)} more)" if others and not prefix else ""
    if first["type"] == "extra_forbidden":
        return f"{key}={short(first['input'])}: no such key; {suggest(words[-1], _siblings(words))}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; it can be set (trainer, attack, metric and analysis to none) but not deleted{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}={short(first['input'])}: {message}{more}"


def _siblings(words: list[str]) -> list[str]:
    section: Any = Config
    for word in words[:-1]:
        hint = section.model_fields[word].annotation
        section = next((t for t in getattr(hint, "__args__", [hint]) if hasattr(t, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)


def short(value: Any) -> str:
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


def omegaconf_line(error: OmegaConfBaseException) -> str:
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
        return omegaconf_line(error)
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
        return f"{group}={option}: no such option; {suggest(option, error.options)}"
    if match := re.search(r"Could not load 'hydra/launcher/(\w+)'", text):  # what one of ours builds on
        ours, extra = _EXTRAS[match[1]]
        return f"hydra/launcher={ours}: needs the extra {extra}: pip install -e '.[{extra}]'"
    if match := re.search(r"Could not load '(?:.*/)?(\w+)/([^/']+)'", text):  # one option of a list
        options = [path.stem for path in Path(os.environ["AERL_ROOT"], "conf", match[1]).glob("*.yaml")]
        return f"{match[1]}={match[2]}: no such option; {suggest(match[2], options)}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values; -m runs each of them, [a,b] makes them a list, 'a,b' one text"
    cause = error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_override(match[1], cause)
    return f"{text} {omegaconf_line(cause)}".strip()


def _unparsed(word: str) -> str:
    """What Hydra's grammar cannot read, and how it would: a path of a run folder, for example, has = and commas."""
    key, _, value = word.partition("=")
    text = f"{short(key)}={short(value)}" if "=" in word else short(word)
    if UNPRINTABLE.search(word):
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
    return f"{key}: no such key; {suggest(leaf, known)}"


UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

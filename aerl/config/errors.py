"""Errors of the configuration in one line: the key, the value, what would be right."""

import difflib
import os
import re
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from aerl.config.schema import Config
from aerl.runtime.ddp import prints_errors
from aerl.runtime.terminal import full_error, memory_line, override_word, print_error
from aerl.types import UserError

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def print_exception(error: Exception) -> None:
    """One line, or the traceback where the fault is aerl's own or HYDRA_FULL_ERROR=1."""
    if not prints_errors() or getattr(error, "printed", False):
        return
    line = explain(error)
    if line is None or full_error():
        traceback.print_exception(error)
    else:
        print_error(line)


def describe(error: BaseException) -> str:
    """One line for any error."""
    return explain(error) or f"{type(error).__name__}: {error}"


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a fault of aerl's own."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return omegaconf_line(error)
    if line := memory_line(error):
        return line
    if type(error).__module__.startswith(("submitit.", "joblib.")):  # a job did not start, or gave no answer
        return f"hydra.launcher: {text}; the same command goes on"
    if "Could not determine home directory" in text:
        return "data_dir: ~ is unknown, this user has no home folder; data_dir=DIR, or AERL_DATA, says where data go"
    if "Config group override must be a string" in text:
        return f"a group takes the name of an option, or a list of names ({text})"
    if not isinstance(error, HydraException):
        return None
    if isinstance(error, OverrideParseException):
        return _unparsed(str(error.override))
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: no such option; {suggest(option, error.options)}"
    if "'${dataset}_${trainer}'" in text:  # the name of the recipe
        return "dataset, trainer: each takes one option; -m trainer=sl,rl runs several, trainer=none trains nothing"
    if match := re.search(r"Could not load 'hydra/launcher/(\w+)'", text):  # what conf/hydra/launcher builds on
        ours = {"joblib": "gpus", "submitit_slurm": "slurm"}[match[1]]
        extra = match[1].removeprefix("submitit_")
        return f"hydra/launcher={ours}: needs the extra {extra}: pip install -e '.[{extra}]'"
    if match := re.search(r"Could not load '(?:.*/)?(\w+)/([^/']+)'", text):  # one option of a list
        options = [path.stem for path in Path(os.environ["AERL_ROOT"], "conf", match[1]).glob("*.yaml")]
        return f"{match[1]}={match[2]}: no such option; {suggest(match[2], options)}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values; -m runs each of them, [a,b] makes them a list, 'a,b' one text"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and (match := re.search(r"Could not override '([^']+)'", text)):
        parent = cause.parent_node
        if not isinstance(parent, DictConfig) or not parent:
            return f"{match[1]}: no such key; {match[1].rpartition('.')[0]} is null here"
        added = f"; +{match[1]}= adds it" if "_target_" in parent else ""
        return f"{match[1]}: no such key; {suggest(str(cause.key), [str(k) for k in parent if k != 'hydra'])}{added}"
    return text


def suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(sorted(known)) or 'none'}"


def pydantic_line(error: ValidationError, prefix: str = "") -> str:
    """The first of pydantic's complaints as `key=value: what would be right`."""
    first = error.errors()[0]
    words = [str(word) for word in first["loc"] if not str(word).startswith(("function-", "constrained-"))]
    key = short(".".join(word for word in [prefix, *words] if word))
    if first["type"] == "extra_forbidden":
        return f"{key}={short(first['input'])}: no such key; {suggest(words[-1], _siblings(words))}"
    if first["type"] == "missing":
        return f"{key}: missing; it can be set (trainer, attack, metric and analysis to none) but not deleted"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}={short(first['input'])}: {message}"


def _siblings(words: list[str]) -> list[str]:
    section: Any = Config
    for word in words[:-1]:
        hint = section.model_fields[word].annotation
        section = next(kind for kind in getattr(hint, "__args__", [hint]) if hasattr(kind, "model_fields"))
    return list(section.model_fields)


def short(value: Any) -> str:
    try:
        text = "null" if value is None else str(value)
    except ValueError:  # Python refuses to write a number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


_NORMALIZATION = "as the network was trained; model.mean=[0] model.std=[1] if it normalises inside itself"
_EXAMPLES = {
    "model.mean": _NORMALIZATION,
    "model.std": _NORMALIZATION,
    "model.net._target_": "the network's function or class, such as torchvision.models.resnet18",
}


def omegaconf_line(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or "")
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in str(error):
        return f"{key}: must be given, {_EXAMPLES.get(key, f'{key}=...')}"
    message = str(error.msg or error).splitlines()[0]
    return f"{key}: {message}" if key else message


def _unparsed(word: str) -> str:
    """What Hydra's grammar cannot read: the path of a run folder, for example, which has = and commas."""
    key, equals, value = word.partition("=")
    text = f"{short(key)}{equals}{short(value)}"
    if UNPRINTABLE.search(word):
        return f"{text}: has a control character, or a byte that is no text in this locale"
    if re.fullmatch(r"\+{0,2}[a-z][\w./@]*", key) and value and not re.search(r"['\"\[\]{}]", value):
        return f"{text}: needs quotes around its special characters: {override_word(key, value)}"
    return f"{text}: is not an override; expected key=value, in quotes if it has spaces or brackets"

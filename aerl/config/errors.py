"""Errors of the configuration in one line: the key, the value, what would be right."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from aerl.config.names import leaves
from aerl.errors import UserError, short
from aerl.runtime.ddp import prints_errors
from aerl.runtime.terminal import full_error, memory_line, override_word, print_error

if TYPE_CHECKING:
    from pydantic import ValidationError  # --help does without it

LISTS = ("attack", "metric", "analysis", "logger")  # groups that take several options
_EXTRAS = {"joblib": ("gpus", "joblib"), "submitit_slurm": ("slurm", "slurm")}  # what conf/hydra/launcher builds on


def print_exception(error: Exception) -> None:
    """Print one line; the traceback if it is a bug of aerl or HYDRA_FULL_ERROR=1."""
    if not prints_errors() or getattr(error, "printed", False):
        return
    line = explain(error)
    if line is None or full_error():
        traceback.print_exception(error)
    else:
        print_error(line)


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a bug of aerl."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return omegaconf_line(error)
    if isinstance(error, OverrideParseException):
        return _unparsed(str(error.override))
    if isinstance(error, MissingConfigException):
        return _missing_option(str(error.missing_cfg_file))
    if match := re.match(r"Ambiguous value for argument '(.*?)=(.*)' 1\.", text):
        return _several(*match.groups())
    if isinstance(error, HydraException):
        return _unknown_key(error.__cause__) or text
    if type(error).__module__.startswith(("submitit.", "joblib.")):  # a job did not start, or its process died
        return f"hydra.launcher: {text}; the same command resumes"
    return memory_line(error)


def _unparsed(word: str) -> str:
    """What Hydra's grammar cannot read: the path of a run folder, for example, which has = and commas."""
    key, _, value = word.partition("=")
    if value and re.fullmatch(r"\+{0,2}[a-z][\w./@]*", key) and not re.search(r"['\"\[\]{}]", value):
        return f"{key}={short(value)}: needs quotes around its special characters: {override_word(key, value)}"
    return f"{short(word)}: expected key=value, in quotes if it has spaces or brackets"


def _missing_option(name: str) -> str:
    group, _, option = name.rpartition("/")
    if group == "hydra/launcher" and option in _EXTRAS:
        option, extra = _EXTRAS[option]
        return f"{group}={option}: needs the extra {extra}: pip install -e '.[{extra}]'"
    root = Path(os.environ["AERL_ROOT"])
    options = [path.stem for parent in (root / "conf", root) for path in (parent / group).glob("*.yaml")]
    return f"{group}={option}: no such option; {suggest(option, options)}"


def _several(key: str, values: str) -> str:
    """Several values without -m."""
    key = key.lstrip("+")
    line = f"{key}={values}: several values; -m {key}={values} runs one job for each"
    return line + f", '{key}=[{values}]' takes them together" * (key in LISTS)


def _unknown_key(error: BaseException | None) -> str | None:
    if not isinstance(error, ConfigKeyError | ConfigAttributeError):
        return None
    section: Any = error.parent_node or {}  # None: trainer.adversary.weight without an adversary
    name, line = str(error.key), f"{error.full_key}: no such key; "
    value = next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith(f"{error.full_key}=")), "...")
    if "_target_" in section:
        line += f"+{error.full_key}={value} passes it to the _target_; "
    content = OmegaConf.to_container(section) if section else {}
    inside = [key for key, _ in leaves(content) if key.rpartition(".")[2] == name]
    if inside:
        prefix = str(error.full_key).removesuffix(name)
        ends = sorted((f"{prefix}{key}={value}" for key in inside), key=lambda key: not key.startswith("trainer."))
        return f"{line}did you mean {' or '.join(ends[:3])}?"
    return line + suggest(name, [str(key) for key in section if key != "hydra"])


def omegaconf_line(error: OmegaConfBaseException) -> str:
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in str(error):
        return f"{error.full_key}: must be given"
    message = str(error.msg or error).splitlines()[0]
    return f"{error.full_key}: {message}" if error.full_key else message


def pydantic_line(error: "ValidationError", prefix: str = "") -> str:
    """The first of pydantic's complaints as `key=value: what would be right`."""
    first = error.errors()[0]
    words = [str(word) for word in first["loc"] if not str(word).startswith(("function-", "constrained-"))]
    key = short(".".join(word for word in [prefix, *words] if word))
    if first["type"] == "missing":
        return f"{key}: cannot be deleted; set it (for trainer, attack, metric and analysis: to none)"
    message = "no such key" if first["type"] == "extra_forbidden" else first["msg"]
    line = f"{key}={short(first['input'])}: {message.removeprefix('Value error, ').removeprefix('Input ')}"
    if isinstance(first["input"], list) and first["type"] in ("int_type", "float_type", "bool_type", "string_type"):
        line += f"; -m {key}={','.join(map(str, first['input']))} runs one job for each"
    return line


def suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(sorted(known)) or 'none'}"

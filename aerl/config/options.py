"""The options of conf/ without Hydra: for Python, and for run folders from somebody else."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aerl.config.errors import suggest
from aerl.config.names import leaves
from aerl.errors import UserError
from aerl.runtime.files import read_yaml

IN_MEMORY = "aerl.evaluate"  # in place of the network and the source of the images, in a run that Python made


def read_option(group: str, name: str, **values: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The sections that an option of a list group (attack, analysis, metric) sets, by name, and what else it sets.

    `values` replace ${norm}, ${eps}. Raises UserError for an unknown option.
    """
    folder = root() / "conf" / group
    known = [path.stem for path in folder.glob("*.yaml")]
    if not known:
        raise UserError(f"{folder}: no such folder; install aerl from a clone, with pip install -e, or pass functions")
    if name not in known:
        raise UserError(f"{name}: no such {group}; {suggest(name, known)}")
    content = dict(read_yaml(folder / f"{name}.yaml"))
    if "defaults" not in content:
        return ({name: _replaced(content, values)} if content else {}), {}
    sections: dict[str, dict[str, Any]] = {}
    for other in content.pop("defaults"):
        sections |= read_option(group, other, **values)[0]
    return sections, content


def root() -> Path:
    """The folder of conf/: that of launch.py."""
    return Path(os.environ.get("AERL_ROOT") or Path(__file__).resolve().parents[2])


def _replaced(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    known = {f"${{{key}}}": value for key, value in values.items()}
    return {key: known.get(value, value) if isinstance(value, str) else value for key, value in content.items()}


def check_targets(config: Mapping[str, Any], choices: Mapping[str, str], what: str, remedy: str) -> None:
    """UserError if the config.yaml of a run folder, which may be somebody else's, names code that is not aerl's.

    Its network and its dataset are built: they must be those of our options `choices`. `what` names the folder,
    `remedy` how to allow it.
    """
    ours = {}
    for group, section in (("model", "net"), ("dataset", "source")):
        path = root() / "conf" / group / f"{choices.get(group)}.yaml"
        plain = re.fullmatch(r"[\w-]+", str(choices.get(group))) and path.is_file()
        ours[f"{group}.{section}._target_"] = read_yaml(path)[section]["_target_"] if plain else None
    for key, value in leaves(config, lists=True):
        if key.rpartition(".")[2] != "_target_":
            continue
        known = value == ours[key] if key in ours else str(value).partition(".")[0] in ("aerl", "torch")
        if not known:
            raise UserError(f"{what}: its {key} is {value}, which is not aerl's; if you trust it, {remedy}")

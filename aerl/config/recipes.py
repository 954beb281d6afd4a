"""Recipes: settings for one dataset and trainer, conf/recipe/DATASET_TRAINER.yaml.

A trainer without a recipe of its own gets the one of the trainer that it builds on, the first of its defaults. What the
trainer's file itself states still counts: the recipe comes before it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf


def inherited(dataset: str, trainer: str) -> tuple[str, DictConfig] | None:
    """The recipe of the trainer on which `trainer` builds, and what the files from there on state themselves.

    None if it has its own recipe, or none of them has one.
    """
    own: list[DictConfig] = []
    for name, content in _chain(trainer):
        if _file(f"recipe/{dataset}_{name}"):
            return (f"{dataset}_{name}", OmegaConf.merge({}, *reversed(own))) if own else None  # type: ignore[return-value]
        own.append(content)
    return None


def _chain(trainer: str) -> Iterator[tuple[str, DictConfig]]:
    """The name and content of a trainer's file, of the one on which it builds, and so on."""
    seen: set[str] = set()
    while (file := _file(f"trainer/{trainer}")) and trainer not in seen:
        seen.add(trainer)
        content: Any = OmegaConf.load(file)
        if not isinstance(content, DictConfig):
            return
        defaults = content.pop("defaults", None) or []
        yield trainer, content
        names = [name for name in defaults if isinstance(name, str) and name != "_self_"]
        if not names:
            return
        trainer = names[0].rpartition("/")[2]


def _file(config: str) -> Path | None:
    """The YAML file of a configuration, in conf/ or in a folder that the user adds by --config-dir."""
    folders = [f"{os.environ['AERL_ROOT']}/conf"]
    if GlobalHydra.instance().is_initialized():
        path = GlobalHydra.instance().config_loader().get_search_path().get_path()
        folders += [part.path.removeprefix("file://") for part in path if part.path]
    return next((file for folder in folders if (file := Path(folder, f"{config}.yaml")).is_file()), None)


class RecipeSource(ConfigSource):
    """The last place where Hydra looks for recipe/DATASET_TRAINER: the recipe that the trainer inherits."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        return _inherited_at(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        found = _inherited_at(config_path)
        assert found is not None
        recipe, own = found
        config = OmegaConf.create({"defaults": [recipe, "_self_"], "trainer": own})
        return ConfigResult(self.scheme(), f"{self.scheme()}://", config, {"package": "_global_"})


def _inherited_at(config_path: str) -> tuple[str, DictConfig] | None:
    """What recipe/DATASET_TRAINER inherits; there may be underscores in the names of both, too."""
    group, _, option = config_path.removesuffix(".yaml").rpartition("/")
    words = option.split("_") if group == "recipe" else []
    for number in range(1, len(words)):
        dataset, trainer = "_".join(words[:number]), "_".join(words[number:])
        if _file(f"dataset/{dataset}") and (found := inherited(dataset, trainer)):
            return found
    return None

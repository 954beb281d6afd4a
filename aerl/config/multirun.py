"""The overrides of a run, and the jobs of a multirun, checked before the first begins."""

import re
from collections.abc import Sequence

from omegaconf import DictConfig, flag_override

from aerl.config.compose import read
from aerl.config.errors import explain, short, suggest
from aerl.types import UserError

# What of Hydra's own configuration has an effect here; aerl keeps its run folders and its log by itself.
_HYDRA_KEYS = ("launcher", "sweeper", "callbacks", "mode", "searchpath", "sweep.dir", "job.env_set", "job.env_copy")


def check_overrides(cfg: DictConfig) -> None:
    """UserError for an override that Hydra accepts, and that would have no effect."""
    from hydra.core.global_hydra import GlobalHydra

    for word in [*cfg.hydra.overrides.hydra, *cfg.hydra.overrides.task]:
        key, _, value = word.lstrip("+~").partition("=")
        inside = re.sub(r"^hydra[./]", "", key)
        if inside != key and not inside.startswith(_HYDRA_KEYS):
            raise UserError(f"{key}={short(value)}: has no effect here; of Hydra's keys {', '.join(_HYDRA_KEYS)} have")
        if key == "recipe" and value != "null":
            options = GlobalHydra.instance().config_loader().get_group_options("recipe")
            if unknown := [name for name in value.strip("[]").split(",") if name not in options]:
                raise UserError(f"recipe={short(unknown[0])}: no such option; {suggest(unknown[0], options)}")


def sweep_jobs(cfg: DictConfig) -> list[list[str]] | None:
    """The overrides of every job of a multirun; None where its sweeper finds them as it goes."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not cfg.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    words = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    words += cfg.hydra.overrides.task
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(words)
    try:
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    except HydraException:  # which the sweeper is about to raise itself
        return None
    if not jobs:
        raise UserError(f"{' '.join(words)}: means no job at all; a list of values is empty")
    return jobs


def check_jobs(cfg: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Compose and check every job of a multirun before its first begins; UserError names the first wrong one."""
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
            if (line := explain(error)) is None:
                raise
            raise UserError(f"{line} (job {number} of {len(jobs)}: {' '.join(words)})") from error
    HydraConfig.instance().cfg = before

"""The jobs of a multirun, checked before the first one starts."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from aerl.config.compose import read
from aerl.config.errors import explain
from aerl.errors import UserError


def sweep_jobs(cfg: DictConfig) -> list[list[str]] | None:
    """The overrides of every job of a multirun; None if its sweeper finds them as it goes."""
    if not cfg.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    words = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    words += cfg.hydra.overrides.task
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(words), max_batch_size=None)
    if not jobs:
        raise UserError(f"{' '.join(words)}: gives no jobs: a list of values is empty")
    return jobs


def check_jobs(cfg: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Compose and check every job of a multirun; UserError names the first wrong one."""
    from aerl.build import check

    loader = GlobalHydra.instance().config_loader()
    for number, words in enumerate(jobs):
        try:
            job = loader.load_sweep_config(cfg, list(words))
            check(read(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])))
        except Exception as error:
            if (line := explain(error)) is None:
                raise
            raise UserError(f"{line} (job {number} of {len(jobs)}: {' '.join(words)})") from error

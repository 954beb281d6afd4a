"""The jobs of a multirun, checked before the first one starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
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


@dataclass(frozen=True)
class Space:
    """What a search may choose for a key: one of `choices`, else a number from `low` to `high`, whole with a `step`."""

    choices: tuple[str | int | float | bool, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: int | None = None
    log: bool = False


def search_space(words: Sequence[str]) -> tuple[list[str], dict[str, Space]]:
    """The words with one value, and the keys with several, in Hydra's grammar of sweeps. UserError without any."""
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import OverrideParseException

    try:
        overrides = OverridesParser.create().parse_overrides(list(words))
    except OverrideParseException as error:
        raise UserError(explain(error) or str(error)) from error
    fixed, space = [], {}
    for override in overrides:
        value: Any = override.value()  # Hydra's types allow None for the ends, its parser does not
        key = override.key_or_group
        if (kind := type(value)) is ChoiceSweep:
            space[key] = Space(tuple(str(each) if isinstance(each, QuotedString) else each for each in value.list))
        elif kind is RangeSweep:
            step = int(value.step or 1)
            space[key] = Space(low=value.start, high=value.stop - step, step=step)
        elif kind is IntervalSweep:
            space[key] = Space(low=value.start, high=value.end, log="log" in value.tags)
        else:
            fixed.append(override.input_line or "")
    if not space:
        raise UserError(f"{' '.join(words)}: nothing to search; such as trainer.optimizer.lr=interval(1e-4,1e-1)")
    return fixed, space

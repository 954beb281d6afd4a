"""launch.py's command line: Hydra with errors in one line, and what conf/ computes.

--help and --cfg answer in under a second, so nothing slow is imported here.
"""

import argparse
import gc
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import hydra._internal.utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from aerl.runtime import signals
from aerl.runtime.terminal import lost_output, print_error, protect_streams

__all__ = ["lost_output", "prepare_words", "register_resolvers", "run_command", "run_job"]


def register_resolvers() -> None:
    """The resolvers that conf/ uses: ${share:}, ${times:}, ${gpus:}."""
    OmegaConf.register_new_resolver("share", lambda part, total: round(part * total), replace=True)
    OmegaConf.register_new_resolver("times", _times, replace=True)
    OmegaConf.register_new_resolver("gpus", _gpus, replace=True)


def _times(factor: float, number: float | str) -> float:
    from aerl.types import quotient

    return factor * float(quotient(number))


def _gpus() -> int:
    """How many jobs this machine has a GPU for; 1 where it has none."""
    from aerl.runtime.gpus import visible

    return max(1, len(visible()))


def run_command(main: Callable[[], object]) -> int:
    """Call Hydra's `main` on this process's command line; returns the exit code."""
    protect_streams()
    hydra._internal.utils.run_and_report = lambda func: func()  # its own prints many lines about an error
    argparse.ArgumentParser.error = _refuse  # type: ignore[method-assign, assignment]
    try:
        sys.argv[1:] = prepare_words(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        from aerl.config.errors import print_exception

        print_exception(error)
        return signals.REQUEUE if signals.received() else 1
    return 0


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    print_error(f"{message}; an override is key=value, without dashes (see --help)")
    sys.exit(2)


def prepare_words(words: Sequence[str]) -> list[str]:
    """The words of a command line as Hydra reads them: -m first, and a path that begins with ~ in quotes."""
    for word in words:
        key, _, value = word.partition("=")
        # Hydra looks for a folder named like the key, and Python refuses to read a longer number.
        if len(key.encode(errors="replace")) > 255 or re.search(r"\d{4301}", word):
            from aerl.types import UserError

            raise UserError(f"{key[:80]}={value[:80]}...: the key or a number in it is too long")
    quoted = [re.sub(r"(?<=[=,\[])~[\w./@+:-]*(?=[,\]]|$)", r"'\g<0>'", word) for word in words]
    return sorted(quoted, key=lambda word: word not in ("-m", "--multirun"))


def run_job(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Run one job; an error is printed where it happens, and stops neither the other jobs nor their table.

    What is raised for Hydra has no traceback into the job, whose model and optimizer are free for the next one.
    """
    from aerl.config.errors import describe, print_exception
    from aerl.types import UserError

    register_resolvers()  # in a worker of a multirun
    if signals.is_worker():
        protect_streams()
    _log_to_stderr()
    gc.collect()
    try:
        if signals.is_worker():
            signals.defer_in_worker()
            signals.request_stop(signals.received())  # what came during an earlier job
            signals.raise_if_stopped()
        return run(cfg)
    except signals.Stopped as stopped:
        if not signals.is_worker():
            raise
        failure = UserError(str(stopped))  # joblib would kill the other workers before they have saved
    except Exception as error:
        print_exception(error)
        failure = UserError(describe(error))
        failure.printed = True
    if HydraConfig.get().mode is RunMode.RUN:
        sys.exit(1)
    raise failure


def _log_to_stderr() -> None:
    """Plain lines of aerl's own; Hydra has pointed the root logger at standard output."""
    from aerl.runtime import ddp

    log = logging.getLogger("aerl")
    label = f"job {HydraConfig.get().job.num}: " if signals.is_worker() else ""
    log.setLevel(logging.DEBUG if ddp.is_main() else logging.CRITICAL)
    log.propagate = False
    logging.getLogger().setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk is reported by the files that matter
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.handlers[0].setLevel(logging.INFO)  # tracebacks go to run.log alone
    log.handlers[0].setFormatter(logging.Formatter(f"{label}%(message)s"))

"""launch.py's command line: Hydra with errors in one line. --help and --cfg answer in under a second."""

import argparse
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra._internal.utils
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from aerl.config.errors import LISTS, explain, print_exception
from aerl.config.recipes import RecipeSource
from aerl.errors import UserError
from aerl.runtime import ddp, gpus, signals
from aerl.runtime.terminal import Parser, protect_streams

# What may be set of Hydra's own configuration; aerl has its own run folders and log.
_HYDRA_KEYS = ("launcher", "sweeper", "callbacks", "mode", "searchpath", "sweep.dir", "job.env_set", "job.env_copy")


def register_resolvers() -> None:
    """What conf/ uses: the resolvers ${share:}, ${times:}, ${gpus:}, and the recipes that trainers inherit."""
    Plugins.instance().register(RecipeSource)
    OmegaConf.register_new_resolver("share", lambda part, total: round(part * total), replace=True)
    OmegaConf.register_new_resolver("times", _times, replace=True)
    OmegaConf.register_new_resolver("gpus", lambda: max(1, len(gpus.visible())), replace=True)


def _times(factor: float, number: float | str) -> float:
    from aerl.types import quotient

    return factor * float(quotient(number))


def run_command(main: Callable[[], object]) -> int:
    """Call Hydra's `main` on this process's command line; returns the exit code."""
    protect_streams()
    hydra._internal.utils.run_and_report = lambda func: func()  # its own prints many lines about an error
    argparse.ArgumentParser.error = Parser.error  # type: ignore[method-assign, assignment]
    try:
        sys.argv[1:] = prepare_words(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except Exception as error:
        print_exception(error)
        return signals.REQUEUE if signals.received() else 1
    return 0


def prepare_words(words: Sequence[str]) -> list[str]:
    """The checked words of a command line as Hydra reads them.

    -m comes first, a path that begins with ~ in quotes. ++ goes before the settings of an optimizer and a network:
    their keys are those of the `_target_`, of which a YAML file has only some.
    """
    for word in words:
        _check(word)
    quoted = [re.sub(r"(?<=[=,\[])~[\w./@+:-]*(?=[,\]]|$)", r"'\g<0>'", word) for word in words]
    sections = r"model\.net" if "trainer=none" in words else r"model\.net|trainer\.optimizer"
    quoted = [re.sub(rf"^({sections})\.\w+=", r"++\g<0>", word) for word in quoted]
    return sorted(quoted, key=lambda word: word not in ("-m", "--multirun"))


def _check(word: str) -> None:
    """UserError for what Hydra would ignore, or answer with a traceback."""
    key, _, value = word.lstrip("+~").partition("=")
    if len(key.encode(errors="replace")) > 255 or re.search(r"\d{4301}", word):  # Python reads no longer number
        raise UserError(f"{word[:80]}...: the key or a number in it is too long")
    if re.match(r"hydra[./]", key) and not key[6:].startswith(_HYDRA_KEYS):
        raise UserError(f"{word}: not supported; supported Hydra keys: {', '.join(_HYDRA_KEYS)}")
    options = {path.stem for path in Path(os.environ["AERL_ROOT"], "conf", key).glob("*.yaml")}
    several = value.startswith("[") and key not in LISTS
    if options and (word.startswith("~") or ("=" in word and value in ("", "null")) or several):
        raise UserError(f"{word}: expected one option of {key}; -m {key}=A,B runs one job per option")
    if key == "recipe" and not options.issuperset(value.split(",")):  # optional in conf/config.yaml
        raise UserError(f"{word}: no such option; known: {', '.join(sorted(options))}")


def run_job(run: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    """Run one job; an error is printed where it happens, and stops neither the other jobs nor their table.

    What is raised for Hydra has no traceback into the job: its model and optimizer are freed before the next one.
    """
    register_resolvers()  # in a worker of a multirun
    gc.collect()
    try:
        if signals.is_worker():
            protect_streams()
            signals.defer_in_worker()
            signals.request_stop(signals.received())  # what came during an earlier job
            signals.raise_if_stopped()
        _log_to_stderr()
        return run(cfg)
    except signals.Stopped as stopped:
        if not signals.is_worker():
            raise
        failure = UserError(str(stopped))  # joblib would kill the other workers before they have saved
    except Exception as error:
        print_exception(error)
        failure = UserError(explain(error) or f"{type(error).__name__}: {error}")
        failure.printed = True
    if HydraConfig.get().mode is RunMode.RUN:
        sys.exit(1)
    raise failure


def _log_to_stderr() -> None:
    """Plain lines of aerl's own; Hydra has pointed the root logger at standard output."""
    log = logging.getLogger("aerl")
    log.setLevel(logging.DEBUG if ddp.is_main() else logging.CRITICAL)
    log.propagate = False
    logging.getLogger().setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk is reported by the files that matter
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.handlers[0].setLevel(logging.INFO)  # tracebacks go to run.log alone
    label = f"job {HydraConfig.get().job.num}: " if signals.is_worker() else ""
    log.handlers[0].setFormatter(logging.Formatter(f"{label}%(message)s"))

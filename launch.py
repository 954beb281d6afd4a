"""Train, attack and judge an image classifier: `python launch.py --help` explains the command line."""

import argparse
import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    from aerl.runtime import signals

    signals.install_handlers()  # before imports that take seconds

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent  # of a link to this file, too
# Lets multirun_sweeps/ lie beside conf/ and be found from any working directory.
os.environ.setdefault("AERL_ROOT", str(ROOT))


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> float | None:
    from aerl.run import run
    from aerl.runtime import signals
    from aerl.runtime.terminal import protect_streams
    from aerl.types import UserError

    register()  # a worker of a multirun gets this function alone
    if signals.is_worker():
        protect_streams()
    single = HydraConfig.get().mode is RunMode.RUN
    try:
        return run(cfg)
    except signals.Stopped as stopped:
        if signals.is_worker():  # joblib would kill the other workers, before they have saved
            raise UserError(str(stopped)) from None
        raise
    except Exception as error:
        print_exception(error)
        if single:
            sys.exit(1)
        printed.append(error)
        release(error)
        raise  # Hydra runs the other jobs of the multirun, and then raises it again
    finally:
        if not single:
            gc.collect()  # the memory that this job's model and optimizer took is the next one's


def register() -> None:
    """The resolvers that conf/ uses."""
    OmegaConf.register_new_resolver("share", lambda part, whole: round(part * whole), replace=True)
    OmegaConf.register_new_resolver("times", times, replace=True)
    OmegaConf.register_new_resolver("gpus", gpus, replace=True)


def times(factor: float, number: float | str) -> float:
    """For YAML that derives one length from another, which may still be text such as 8/255."""
    from aerl.types import quotient

    return factor * float(quotient(number))


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In place of argparse's own many lines."""
    from aerl.runtime.terminal import print_error

    print_error(f"{message}; an override is key=value, without dashes (see --help)")
    sys.exit(2)


def prepared(words: Sequence[str]) -> list[str]:
    """The words of a command line as Hydra reads them: -m first, and a path that begins with ~ in quotes."""
    wrong = None
    for word in words:
        key, _, value = word.partition("=")
        if len(key.encode(errors="replace")) > 255:  # Hydra would look for a folder of that name
            wrong = f"{key[:77]}...={value[:77]}: no such key; none has more than 255 bytes"
        elif match := re.search(r"\d{4301,}", word):
            wrong = f"{key[:80]}={value[:77]}...: a number of {len(match[0])} digits; 4300 can be read"
    if wrong is not None:
        from aerl.types import UserError  # which takes longer than --help

        raise UserError(wrong)
    quoted = [re.sub(r"(?<=[=,\[])~[\w./@+:-]*(?=[,\]]|$)", r"'\g<0>'", word) for word in words]
    return sorted(quoted, key=lambda word: word not in ("-m", "--multirun"))


def working_folder() -> None:
    """UserError where the folder that this was started in has been deleted since: Hydra and others ask for it."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        from aerl.types import UserError

        raise UserError(f"the current folder cannot be used ({error.strerror}); change to another") from error


def gpus() -> int:
    """How many jobs this machine has a GPU for; one where there is none."""
    from aerl.runtime.gpus import visible

    return max(1, len(visible()))


def print_exception(error: Exception) -> None:
    """One line, or the traceback where the fault is aerl's own or the user asks for it."""
    from aerl.config.errors import explain
    from aerl.runtime.ddp import prints_errors
    from aerl.runtime.terminal import full_error, print_error

    if not prints_errors():
        return
    line = explain(error)
    if line is None or full_error():
        traceback.print_exception(error)
    else:
        print_error(line)


def release(error: BaseException) -> None:
    """Let go of what the frames of an exception, and of those before it, hold: a failed job's model, for one."""
    chain: list[BaseException | None] = [error]
    seen = set()
    while chain:
        if (cause := chain.pop()) is not None and id(cause) not in seen:
            seen.add(id(cause))
            traceback.clear_frames(cause.__traceback__)
            cause.__traceback__ = None
            chain += [cause.__cause__, cause.__context__]


register()
printed: list[Exception] = []  # of the jobs of a multirun

if __name__ == "__main__":
    from aerl.runtime.terminal import full_error, lost_output, protect_streams

    protect_streams()
    os.environ["AERL_FULL_ERROR"] = str(int(full_error()))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing many lines of its own
    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign]
    try:
        sys.argv[1:] = prepared(sys.argv[1:])
        working_folder()
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if error not in printed:
            print_exception(error)
        signals = sys.modules.get("aerl.runtime.signals")
        sys.exit(signals.REQUEUE if signals and signals.received() else 1)
    finally:
        if multirun := sys.modules.get("aerl.report.multirun"):  # Hydra has imported its callback
            multirun.print_table()
        if ddp := sys.modules.get("aerl.runtime.ddp"):
            ddp.destroy_process_group()
    sys.exit(lost_output())

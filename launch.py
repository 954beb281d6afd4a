"""Train, attack and judge an image classifier: `python launch.py --help` explains the command line."""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    from aerl import interrupt

    interrupt.begin()  # before imports that take seconds

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

# Lets multirun_sweeps/ lie beside conf/ and be found from any working directory.
os.environ.setdefault("AERL_ROOT", str(Path(__file__).resolve().parent))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    from aerl import interrupt
    from aerl.run import run
    from aerl.types import UserError

    register()  # a worker of a multirun gets this function alone
    try:
        return run(cfg)
    except interrupt.Stopped as stopped:
        if interrupt.is_worker():  # joblib would kill the other workers, before they have saved
            raise UserError(str(stopped)) from None
        raise
    except Exception as error:
        tell(error)
        if HydraConfig.get().mode is RunMode.RUN:
            sys.exit(1)
        told.append(error)
        raise  # Hydra runs the other jobs of the multirun, and then raises it again


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
    print(f"error: {message}; an override is key=value, without dashes (see --help)", file=sys.stderr)
    sys.exit(2)


def gpus() -> int:
    """How many jobs this machine has a GPU for; one where there is none."""
    from aerl.gpus import visible

    return max(1, len(visible()))


def tell(error: Exception) -> None:
    """One line, or the traceback where the fault is aerl's own or the user asks for it."""
    from aerl.config import explain
    from aerl.distributed import speaks

    if not speaks():
        return
    line = explain(error)
    if line is None or wants_traceback:
        traceback.print_exception(error)
    else:
        print(f"error: {line}", file=sys.stderr)


register()
told: list[Exception] = []  # of the jobs of a multirun

if __name__ == "__main__":
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing many lines of its own
    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign]
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if error not in told:
            tell(error)
        interrupt = sys.modules.get("aerl.interrupt")
        sys.exit(interrupt.REQUEUE if interrupt and interrupt.heard() else 1)
    finally:
        if multirun := sys.modules.get("aerl.report.multirun"):  # Hydra has imported its callback
            multirun.conclude()
        if distributed := sys.modules.get("aerl.distributed"):
            distributed.leave()

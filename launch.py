"""Train, attack and evaluate an image classifier: `python launch.py --help` explains the command line."""

import os
import sys
from pathlib import Path

from aerl.runtime import signals

if __name__ == "__main__":
    signals.install_handlers()  # before imports that take seconds

import hydra
from omegaconf import DictConfig

from aerl.config import cli

ROOT = Path(__file__).resolve().parent  # of a link to this file, too
os.environ.setdefault("AERL_ROOT", str(ROOT))  # multirun_sweeps/ lies beside conf/ and is found from any folder
cli.register_resolvers()


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> float | None:
    from aerl.config.cli import run_job  # a worker of a multirun gets this function alone
    from aerl.run import run

    return run_job(run, cfg)


if __name__ == "__main__":
    try:
        code = cli.run_command(main)
    finally:  # --help imports neither of these
        if multirun := sys.modules.get("aerl.report.multirun"):  # Hydra has imported its callback
            multirun.print_table()
        if ddp := sys.modules.get("aerl.runtime.ddp"):
            ddp.destroy_process_group()
    sys.exit(code or cli.lost_output())

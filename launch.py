"""Train, attack and evaluate an image classifier: `python launch.py --help` explains the command line."""

import os
import sys
from pathlib import Path

from aerl.runtime import ddp, signals

if __name__ == "__main__":
    signals.install_handlers()  # before imports that take seconds

import hydra
from omegaconf import DictConfig

from aerl.config import cli
from aerl.report.multirun import print_table
from aerl.runtime.terminal import lost_output

ROOT = Path(__file__).resolve().parent  # of a link to this file, too
os.environ.setdefault("AERL_ROOT", str(ROOT))
cli.register_resolvers()


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> float | None:
    from aerl.run import run

    return cli.run_job(run, cfg)


if __name__ == "__main__":
    try:
        code = cli.run_command(main)
    finally:
        print_table()
        ddp.destroy_process_group()
    sys.exit(code or lost_output())

"""What every test shares: the repository's root, a quiet offline environment, and a way to run launch.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import launch as _launch  # registers the resolvers and AERL_ROOT that conf/ needs, for tests that compose in-process

assert _launch
ROOT = Path(__file__).resolve().parent.parent

os.environ["OMP_NUM_THREADS"] = "1"  # the tests' networks are too small for two threads
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
    os.environ.pop(name, None)


def environment(data_dir: Path, home: Path, **extra: str) -> dict[str, str]:
    """Of a run without a key, a network or anything else of the tester's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    fonts = str(data_dir / "matplotlib")  # else every run searches for fonts
    ours = {"AERL_DATA": str(data_dir), "HOME": str(home), "MPLCONFIGDIR": fonts, "HF_HUB_OFFLINE": "1"}
    if "PYTHONPATH" in extra and "PYTHONPATH" in kept:  # some machines find their packages through it
        extra["PYTHONPATH"] += os.pathsep + kept["PYTHONPATH"]
    return {**kept, **ours, "COLUMNS": "100", **extra}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A network that a test builds is the same each time: one of random weights may classify no sample correctly."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared datasets, shared by all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def launch(tmp_path: Path, data_dir: Path):  # type: ignore[no-untyped-def]
    """`launch("trainer=rl", ...)` runs the real command line in an empty folder, offline and without a key."""

    def run(*words: str, cwd: Path = tmp_path, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch.py"), *words]
        env = environment(data_dir, tmp_path / "home", **extra)
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    return run


@pytest.fixture(scope="session")
def hardware():  # type: ignore[no-untyped-def]
    """The CPU in fp32, as `hardware=cpu` sets it up."""
    from aerl.runtime.device import set_up

    settings = {"tf32": False, "channels_last": True, "compile": False, "threads": None, "deterministic": False}
    return set_up(device="cpu", precision="fp32", **settings)

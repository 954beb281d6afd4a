"""What every test shares: the repository's root, a quiet offline environment, and a way to run launch.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch as _launch  # registers the resolver and AERL_ROOT that conf/ needs, for tests that compose in-process

assert _launch
ROOT = Path(__file__).resolve().parent.parent

# The networks of the tests are too small for two threads to pay, and on a busy machine they cost dearly.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing of the tester's own is used.
for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
    os.environ.pop(name, None)


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

    def run(
        *words: str, cwd: Path = tmp_path, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
        env |= {
            "AERL_DATA": str(data_dir),
            "HOME": str(tmp_path / "home"),
            "MPLCONFIGDIR": str(data_dir / "matplotlib"),  # else every run would look for fonts anew
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
            **environment,
        }
        command = [sys.executable, str(ROOT / "launch.py"), *words]
        return subprocess.run(
            command,
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def hardware():  # type: ignore[no-untyped-def]
    """The CPU in fp32, as `hardware=cpu` sets it up."""
    from aerl.runtime.device import set_up

    return set_up(
        device="cpu",
        precision="fp32",
        tf32=False,
        channels_last=True,
        compile=False,
        threads=None,
        deterministic=False,
    )

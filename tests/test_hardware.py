"""What one job of a multirun sets up is not the next one's, and what a machine lacks is said before a run begins."""

import os

import pytest
import torch

from aerl.runtime.device import set_up

PLAIN = {
    "device": "cpu", "precision": "fp32", "tf32": False, "channels_last": True, "compile": False, "threads": None,
    "deterministic": False,
}  # fmt: skip


def settings():
    backends = torch.backends
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": backends.cudnn.benchmark,
        "tf32": (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 3},
        {"tf32": True},
        pytest.param({"deterministic": True}, marks=pytest.mark.slow),  # imports the compiler, which takes seconds
    ],
)
def test_a_setting_of_one_job_is_not_the_next_ones(change):
    set_up(**PLAIN)
    before = settings()
    set_up(**PLAIN | change)
    assert settings() != before
    set_up(**PLAIN)
    assert settings() == before


@pytest.mark.slow
def test_without_a_compiler_compile_ends_in_one_line_before_the_run(launch, tmp_path):
    done = launch("hardware.compile=true", "trainer.epochs=1", "attack=none", "analysis=none", CXX="/no/such/compiler")
    (line,) = done.stderr.splitlines()[-1:]
    assert done.returncode == 1 and line.startswith("error: hardware.compile=true: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()

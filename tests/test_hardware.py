"""The settings of hardware=: for one job of a multirun and not the next, and their effect on training."""

import os
import shutil

import pytest
import torch

from aerl.runtime.device import Hardware, set_up
from aerl.training.loop import Recipe, build_optimizer

PLAIN = {
    "device": "cpu", "precision": "fp32", "tf32": False, "channels_last": True, "compile": False, "threads": None,
    "deterministic": False,
}  # fmt: skip
QUICK = ("trainer.epochs=1", "attack=fgsm", "analysis=none", "logger=none", "evaluation.samples=20",
         "dataset.train_samples=64", "name=r")  # fmt: skip


def settings():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), cudnn.benchmark,
            cuda.allow_tf32, cudnn.allow_tf32, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 3},
        {"tf32": True},
        pytest.param({"deterministic": True}, marks=pytest.mark.slow),  # imports the compiler, which takes seconds
    ],
)
def test_a_setting_of_one_job_does_not_hold_for_the_next(change):
    set_up(**PLAIN)
    before = settings()
    set_up(**PLAIN | change)
    assert settings() != before
    set_up(**PLAIN)
    assert settings() == before


def weights(folder):
    return torch.load(folder / "runs/r/checkpoints/best.pt")["model"]


@pytest.mark.slow
def test_a_deterministic_run_is_repeated_bit_for_bit(launch, tmp_path):
    runs = []
    for _ in range(2):
        done = launch(
            "hardware.deterministic=true", "trainer=rl_adv", "trainer.adversary.start_epoch=0", *QUICK, "overwrite=true"
        )
        assert done.returncode == 0, done.stderr
        runs.append(weights(tmp_path))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_fast_weights_are_float32_and_load_without_the_compilers_names(launch, tmp_path):
    done = launch("hardware=fast", "trainer=sl_adv", "trainer.adversary.start_epoch=0", "trainer.batch_size=32", *QUICK)
    assert done.returncode == 0, done.stderr
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(tmp_path).values())
    assert not any("_orig_mod" in name for name in weights(tmp_path))


@pytest.mark.slow
def test_a_missing_compiler_is_one_line_before_the_run(launch, tmp_path):
    done = launch("hardware=fast", "trainer.epochs=1", "attack=none", "analysis=none", CXX="/no/such/compiler")
    (line,) = done.stderr.splitlines()[-1:]
    assert done.returncode == 1 and line.startswith("error: hardware.compile=true: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("cuda", True)])
def test_fused_is_for_optimizers_that_have_it_on_a_gpu(monkeypatch, device, fused):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda self, params, fused=None: seen.append(fused))
    recipe = Recipe(epochs=1, batch_size=1, optimizer=torch.optim.AdamW, objective=lambda: None)
    build_optimizer(recipe, torch.nn.Linear(1, 1), Hardware(torch.device(device), fused=True))
    assert seen == [fused]

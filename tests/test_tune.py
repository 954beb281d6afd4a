"""Optuna's search over real runs: what it reads from them, prunes and goes on with."""

import signal
import subprocess
import sys
import time

import pytest

from aerl.config.multirun import search_space
from aerl.errors import UserError
from aerl.tracking.results import read_results
from tests.conftest import environment

SHORT = ("trainer=pgd_at", "trainer.epochs=2", "dataset.train_samples=100", "logger=none", "hardware.threads=1")


def start(place, data_dir, *words):
    command = [sys.executable, "-m", "aerl.tune", *SHORT, *words]
    return subprocess.Popen(command, cwd=place, env=environment(data_dir, place, PYTHONPATH=str(sys.path[0])),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def trials(place):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(place / "runs/tune/study/study.log")))
    return optuna.load_study(study_name="study", storage=storage).trials


def test_a_search_that_is_killed_goes_on_and_its_values_are_those_of_the_runs(tmp_path, data_dir):
    words = ("trainer.optimizer.lr=tag(log,interval(1e-4,1e-2))", "trainer.batch_size=choice(32,64)", "--trials", "2")
    killed = start(tmp_path, data_dir, *words)
    while not (tmp_path / "runs/tune/study/0/summary.json").exists():
        time.sleep(0.1)
        assert killed.poll() is None, killed.stderr.read()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = start(tmp_path, data_dir, *words)
    out, err = done.communicate()
    assert done.returncode == 0, err
    first, *others = trials(tmp_path)
    assert first.state.name == "FAIL" and [t.state.name for t in others] == ["COMPLETE", "COMPLETE"]
    assert others[0].params == first.params
    for trial in others:
        results = read_results(tmp_path / f"runs/tune/study/{trial.number}/results.jsonl")
        values = [r.value for r in results if r.metric == "adversarial_accuracy" and r.split == "val"]
        assert trial.value == max(values) and len(values) == 2
        assert {r.attack for r in results} == {"none"}
        assert f"{trial.value:.4g}" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trainer.optimizer.lr=1e-3"], "nothing to search; such as trainer.optimizer.lr=interval(1e-4,1e-1)"),
        (["trainer.optimizer.lr=interval(1,"], "needs quotes around its special characters"),
        (["trainer.optimiser.lr=choice(1,2)"], "trainer.optimiser: no such key; did you mean optimizer?"),
        (["trainer.epochs=choice(1)", "trainer=sl"], "val/adversarial_accuracy: this trainer does not measure it"),
        (["trainer.epochs=choice(1)", "attack=pgd"], "attack=pgd: aerl.tune sets attack itself"),
    ],
)
def test_what_cannot_be_searched_is_one_line(tmp_path, data_dir, words, line):
    done = start(tmp_path, data_dir, *words)
    _, err = done.communicate()
    assert done.returncode == 1 and line in err and "Traceback" not in err, err


def test_the_space_is_read_in_hydras_grammar():
    fixed, space = search_space(
        ["trainer=rl", "a.b=interval(0,1)", "c=range(1,7,2)", "d=choice(x,'y z',2)", "e=tag(log,interval(1e-3,1))"]
    )
    assert (
        fixed == ["trainer=rl"] and space["a.b"].high == 1 and space["e"].log and space["d"].choices == ("x", "y z", 2)
    )
    assert (space["c"].low, space["c"].high, space["c"].step) == (1, 5, 2)
    with pytest.raises(UserError):
        search_space(["a=1"])

"""Signals: received from the first line on, immediate where nothing is lost, and the second one in any case."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aerl.runtime import signals
from tests.conftest import ROOT
from tests.runs import begin, results_of, summary_of, wait_for


def started(code: str, **options) -> "subprocess.Popen[str]":
    """A process that runs the code and has printed `now`."""
    code = "import sys, time\nfrom aerl.runtime import signals\nsignals.install_handlers()\n" + code
    env, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=pipe, stderr=pipe, text=True, **options)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    return process


def ended(process, within=10.0):
    began = time.monotonic()
    _, err = process.communicate(timeout=max(60, within))
    assert time.monotonic() - began < within and "Traceback" not in err
    return process.returncode, err.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_before_the_run_ends_it_with_one_line(number):
    process = started("print('now', flush=True); time.sleep(30)")
    process.send_signal(number)
    code, (line,) = ended(process)
    assert code == signals.REQUEUE and number.name in line


def test_an_ignored_signal_stays_ignored():
    """As under nohup."""
    process = started(
        "with signals.listening(): print('now', flush=True); time.sleep(1)\nprint('done')",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (0, [])


def test_a_second_signal_ends_the_process():
    """The same signal twice within a second counts once: a launcher and its process group may both send it."""
    process = started("with signals.listening():\n print('now', flush=True)\n while True: time.sleep(0.1)")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.2)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (128 + signal.SIGTERM, [])


def test_a_signal_is_recorded_until_something_may_stop_immediately():
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() == signal.SIGTERM
        with pytest.raises(signals.Stopped), signals.stop_immediately():
            raise AssertionError
    with signals.listening(), pytest.raises(signals.Stopped) as stopped, signals.stop_immediately():
        os.kill(os.getpid(), signal.SIGHUP)
        raise AssertionError
    assert stopped.value.by == signal.SIGHUP and stopped.value.code == signals.REQUEUE


def test_a_launcher_with_a_handler_is_called_when_everything_is_saved():
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    try:
        with signals.listening():
            with signals.stop_immediately():
                os.kill(os.getpid(), signal.SIGUSR2)
            assert calls == [] and signals.received() == signal.SIGUSR2
            signals.request_stop(signals.received())
            signals.raise_if_stopped()  # the launcher lets the run continue
            assert calls == [signal.SIGUSR2] and not signals.received()
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 1.5, 3.0])
def test_a_signal_in_imports_and_preparations_leaves_nothing_incomplete(tmp_path, seconds):
    process = begin(tmp_path, tmp_path / "data", "dataset.size=32", "logger=none")
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    code, lines = ended(process)
    assert code == signals.REQUEUE, lines
    assert sum("SIGTERM" in line for line in lines) == 1
    left = [path for path in tmp_path.rglob("*") if ".lock" not in path.name and "matplotlib" not in path.parts]
    complete = {path.parent for path in left if path.name == "meta.json"}
    assert all(path.parent in complete for path in left if path.suffix == ".npy")


@pytest.mark.slow
def test_autoattack_stops_within_ten_seconds_and_resumes_to_the_same_outcomes(tmp_path, data_dir):
    words = ("trainer.epochs=2", "attack=autoattack", "attack.autoattack.attacks=[square]", "evaluation.samples=300",
             "attack.autoattack.batch_size=250", "attack.autoattack.queries=3000", "eps=0.3", "analysis=none",
             "model=cnn", "model.net.width=0.2", "logger=none")  # fmt: skip
    process = begin(tmp_path, data_dir, *words, "name=cut")
    wait_for((tmp_path / "runs/cut/summary.json").is_file, process, 240)
    wait_for(lambda: "clean_accuracy" in summary_of(tmp_path / "runs/cut"), process, 240)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    code, lines = ended(process)
    assert code == signals.REQUEUE, lines
    assert summary_of(tmp_path / "runs/cut")["status"] == "stopped"
    for name in ("cut", "straight"):
        assert ended(begin(tmp_path, data_dir, *words, f"name={name}"), within=600)[0] == 0
    cut, straight = (dict(np.load(tmp_path / "runs" / name / "outcomes.npz")) for name in ("cut", "straight"))
    assert all(np.array_equal(cut[key], straight[key]) for key in straight)
    assert results_of(tmp_path / "runs/cut") == results_of(tmp_path / "runs/straight")

"""What tests of whole runs share: how to wait for a moment in one, and how to read what it wrote."""

import json
import os
import pty
import subprocess
import sys
import time

import torch
import yaml

from aerl.runtime.files import sha256
from aerl.tracking.results import read_results, write_summary
from tests.conftest import ROOT, environment

# The shortest run.
BARE = ("trainer.epochs=1", "attack=none", "analysis=none", "logger=none")

# For python -c: the command line with a checkpoint after every epoch and the state of an attack after every batch,
# so that a test need not wait for one.
FREQUENT = f"""
import os, runpy, sys
from aerl.runtime import signals
if "TORCHELASTIC_RUN_ID" in os.environ:  # as launch.py does, before what takes seconds
    signals.end_with_parent(9)
import aerl.evaluation.resume
import aerl.training.loop
aerl.training.loop._SECONDS_BETWEEN_CHECKPOINTS = 0
aerl.evaluation.resume._SECONDS_BETWEEN_SAVES = 0
sys.argv = ["launch.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "launch.py")!r}, run_name="__main__")
"""


def begin(place, data_dir, *words, launcher=(), new_session=False, **environment):
    """Start the real command line in the folder `place`, with its own home and without keys."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"AERL_DATA": str(data_dir), "MPLCONFIGDIR": str(data_dir / "matplotlib"), "HOME": str(place)}
    env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "launch.py"), *words], cwd=place, env=env | environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=new_session,
    )  # fmt: skip


def finish(place, data_dir, *words):
    """Run the real command line in the folder `place` to its end; it must succeed."""
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    done = subprocess.run(command, cwd=place, env=environment(data_dir, place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def ended(process, timeout=240):
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(happened, process, seconds=120):
    """Until `happened()`, while the process lives."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def log_of(folder):
    return (folder / "run.log").read_text()


def results_of(folder):
    """Every line of results.jsonl but times."""
    return [
        (r.metric, r.split, r.attack, r.step, r.value)
        for r in read_results(folder / "results.jsonl")
        if r.metric not in ("images_per_second", "seconds")
    ]


def same_end(cut, whole):
    """Weights to the bit, and every number once."""
    weights = [torch.load(folder / "checkpoints/last.pt")["model"] for folder in (cut, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert results_of(cut) == results_of(whole)


def forge(path, change):
    """Change a summary.json or config.yaml as a forger would: the digests that a run records fit again."""
    folder, content = path.parent, yaml.safe_load(path.read_text())
    change(content)
    summary = content if path.suffix == ".json" else summary_of(folder)
    if path.suffix != ".json":
        path.write_text(yaml.safe_dump(content))
    summary.pop("seal", None)
    if "files" in summary:
        summary["files"] = {name: sha256(folder / name) for name in summary["files"] if (folder / name).is_file()}
    write_summary(folder, summary)


def on_a_terminal(code: str, *arguments: str, stdout: int | None = None, **variables: str) -> str:
    """What a program prints on a terminal of 80 columns: stderr, and stdout unless that goes elsewhere."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**env, "TERM": "xterm", "COLUMNS": "80", **variables},
        stdin=theirs, stdout=theirs if stdout is None else stdout, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        screen = b""
        try:
            while chunk := os.read(ours, 65536):
                screen += chunk
        except OSError:  # the other end is closed
            os.close(ours)
        assert process.wait(60) == 0, screen.decode()
    return screen.decode()

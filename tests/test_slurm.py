"""On a real Slurm: a grid as an array; jobs that are requeued or reach their time limit end as if undisturbed.

Slurm's shortest time limit is a minute, and what it requeues waits two, which `scontrol update` cuts short.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs import begin, log_of, same_end, summary_of, wait_for
from tests.test_gpus import WORDS

pytestmark = pytest.mark.slurm
ON_SLURM = ("-m", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def partition():
    asked = ["sinfo", "-h"] if shutil.which("sinfo") else ["false"]
    if not subprocess.run(asked, capture_output=True, check=False).stdout:
        pytest.skip("no Slurm partition to submit to")


@pytest.fixture
def background(tmp_path, data_dir):
    """`background(*words)` starts the real command line; its jobs in the queue are cancelled at the end."""
    started = []

    def start(*words):
        started.append(begin(tmp_path, data_dir, *words))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for job in tmp_path.glob("runs/slurm/*/*_submission.sh"):
        subprocess.run(["scancel", job.name.partition("_")[0]], check=False)


def waits(job: str) -> bool:
    """Whether a job waits to be started again; it then starts at once."""
    squeue = ["squeue", "-h", "-r", "-j", job, "-o", "%T"]
    if "PENDING" not in subprocess.run(squeue, capture_output=True, text=True, check=False).stdout:
        return False
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False)
    return True


@pytest.mark.parametrize("exported", ["ALL", "NONE"])
def test_a_grid_is_an_array_and_ends_with_its_table(launch, tmp_path, exported):
    """Also if the cluster passes no environment on, and from another folder than the repository."""
    done = launch(*ON_SLURM, "seed=0,1,-1", "trainer.epochs=1", "runs_dir=out", *WORDS, SBATCH_EXPORT=exported)
    assert done.returncode == 1
    assert re.search(r"^sl\s+2\s+[\d.]+ ± ", done.stdout, re.MULTILINE), done.stdout
    assert "failed: job 2 (seed=-1): seed=-1: should be" in done.stdout
    jobs = {path.parent.name.partition("_")[::2] for path in tmp_path.glob("out/slurm/*/*_log.out")}
    assert len({array for array, _ in jobs}) == 1 and {task for _, task in jobs} == {"0", "1", "2"}
    folders = {path.parent for path in (tmp_path / "out").glob("*/*/*/*/*/summary.json")}
    assert {folder.name for folder in folders} == {"seed0", "seed1"}


@pytest.mark.parametrize(("event", "epochs"), [("requeue", 40), ("time limit", 100)])
def test_a_job_disturbed_during_training_ends_as_if_undisturbed(launch, background, tmp_path, event, epochs):
    words = ("trainer=rl", f"trainer.epochs={epochs}", *WORDS)
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=50") if event == "time limit" else ()
    process = background(*ON_SLURM, *limit, "seed=0", "name=cut", *words)
    wait_for((tmp_path / "runs/cut/results.jsonl").exists, process)
    ((job,),) = ([path.parent.name] for path in tmp_path.glob("runs/slurm/*/*_log.out"))
    if event == "requeue":
        output_of("scontrol", "requeue", job)
    wait_for(lambda: waits(job), process)
    wait_for(lambda: not waits(job) and summary_of(tmp_path / "runs/cut")["status"] == "finished", process, 600)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert re.search(r"^rl\s+1\s+[\d.]+", output, re.MULTILINE)
    assert re.search(r"after epoch \d+ and step \d+", log_of(tmp_path / "runs/cut"))
    assert launch(*words, "seed=0", "name=straight").returncode == 0
    same_end(tmp_path / "runs/cut", tmp_path / "runs/straight")


def test_the_script_of_the_docs_requeues_only_the_job_that_was_stopped(launch, tmp_path, data_dir):
    (script,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/clusters.md").read_text(), re.MULTILINE | re.DOTALL)
    words = ("trainer=rl", "trainer.epochs=40", *WORDS)
    changes = {
        "--array=0-4": "--array=0-1",
        "--gpus-per-node=1 --cpus-per-task=4": "--ntasks=1",
        "--time=240 --signal=TERM@120": "--time=2",
        "python launch.py trainer=rl dataset=cifar10 model=cnn": " ".join(
            [sys.executable, str(ROOT / "launch.py"), *words, "name=job$SLURM_ARRAY_TASK_ID"]
        ),
    }
    for old, new in changes.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    (tmp_path / "array.sh").write_text(script)
    env = {**os.environ, "AERL_DATA": str(data_dir)}
    sbatch = ["sbatch", "--parsable", "array.sh"]
    array = subprocess.run(sbatch, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        for task in (0, 1):
            wait_for((tmp_path / f"runs/job{task}/results.jsonl").exists, sleeper)
        # The job whose number is that of the whole array.
        task = re.findall(rf"JobId={array} .*ArrayTaskId=(\d)", output_of("scontrol", "show", "job", array))[0]
        output_of("scancel", "--signal=TERM", f"{array}_{task}")
        wait_for(lambda: waits(f"{array}_{task}"), sleeper)
        wait_for(lambda: not output_of("squeue", "-h", "-j", array), sleeper, 300)
    finally:
        sleeper.kill()
        sleeper.wait()
        subprocess.run(["scancel", array], check=False)
    resumed = [len(re.findall(r"after epoch \d", log_of(tmp_path / f"runs/job{number}"))) for number in (0, 1)]
    assert resumed == [int(task) == 0, int(task) == 1]
    assert launch(*words, f"seed={task}", "name=straight").returncode == 0
    same_end(tmp_path / f"runs/job{task}", tmp_path / "runs/straight")

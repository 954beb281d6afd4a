"""Whole runs through the real command line: the folder they leave, resuming, refusing, evaluating, sweeping."""

import contextlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from aerl.tracking.results import read_results
from aerl.verify import verify
from tests.conftest import ROOT, environment
from tests.runs import BARE, FREQUENT, finish, forge, same_end, summary_of, wait_for
from tests.test_wandb import history, read_back
from tests.test_wandb import summary as wandb_summary

SMALL = ("trainer.epochs=2", "evaluation.samples=40", "attack=[fgsm,pgd]", "attack.pgd.steps=5",
         "analysis.masking.samples=12", "analysis.masking.steps=10", "analysis.masking.queries=10",
         "analysis.landscape.resolution=30", "analysis.gradients.steps=5", "analysis.curve.steps=5")  # fmt: skip
QUICK = (*SMALL[:4], "logger=none", "analysis=none")


def only_run(tmp_path):
    (summary,) = (tmp_path / "runs").glob("*/*/*/*/*/summary.json")
    return summary.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """One small finished run, for several tests that only read it."""
    home = tmp_path_factory.mktemp("finished")
    done = finish(home, data_dir, *SMALL)
    return only_run(home), done


def test_files_of_the_run_folder(finished):
    folder, _ = finished
    assert folder.parts[-5:-2] == ("digits", "alicnn", "sl") and folder.name == "seed0"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    measured = ("training", "distance", "curve", "entropy", "confusion", "norms", "gradients", "curvature")
    assert {name for name in files if not name.startswith("wandb/")} == {
        "config.yaml", "results.jsonl", "summary.json", "outcomes.npz", "examples.npz", "evidence.npz",
        "run.log", "report.html", ".lock", "checkpoints/last.pt", "checkpoints/best.pt", "figures/landscape.npz",
        "tables/curve_steps.csv",
        *(f"figures/{name}.{suffix}" for name in (*measured, "pictures", "landscape") for suffix in ("png", "pdf")),
        *(f"tables/{name}.csv" for name in (*measured, "masking")),
    }  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["epochs"] == 2 and config["attack"]["pgd"]["steps"] == 5


def test_outcomes_summary_and_results_agree(finished):
    folder, _ = finished
    summary = summary_of(folder)
    assert summary["status"] == "finished" and summary["error"] is None
    assert summary["masking"]["verdict"] in ("masked", "suspicious", "no sign")
    with np.load(folder / "outcomes.npz", allow_pickle=False) as file:
        outcomes = dict(file)
    metrics = ("pred", "p", "confidence", "entropy")
    attacked = {f"{attack}_{metric}" for attack in ("fgsm", "pgd") for metric in (*metrics, "l1", "l2", "linf")}
    assert set(outcomes) == {"index", "label", *(f"clean_{metric}" for metric in metrics), *attacked}
    right = outcomes["clean_pred"] == outcomes["label"]
    assert len(right) == 40
    assert summary["clean_accuracy"]["value"] == right.mean()
    worst = right.copy()
    for attack in ("fgsm", "pgd"):
        survived = right & (outcomes[f"{attack}_pred"] == outcomes["label"])
        assert summary["robust_accuracy"][attack] == survived.mean()
        assert (outcomes[f"{attack}_l2"] <= 1 + 1e-5).all()
        assert (outcomes[f"{attack}_l2"][~right] == 0).all()  # what is wrong already is not attacked
        worst &= survived
    accuracy = summary["worst_case_accuracy"]
    assert accuracy["value"] == worst.mean() and accuracy["low"] <= worst.mean() <= accuracy["high"]
    results = {(r.metric, r.attack): r for r in read_results(folder / "results.jsonl") if r.split == "test"}
    assert results["clean_accuracy", "none"].value == right.mean()
    assert results["robust_accuracy", "pgd"].value == summary["robust_accuracy"]["pgd"]
    assert (results["robust_accuracy", "pgd"].norm, results["robust_accuracy", "pgd"].eps) == ("L2", 1.0)
    assert results["worst_case_accuracy", "none"].value == worst.mean()
    rewards = [r for r in read_results(folder / "results.jsonl") if r.split == "train" and r.metric == "reward"]
    assert [r.step for r in rewards] == [1, 2]


def test_closing_table(finished):
    folder, done = finished
    assert re.search(r"clean .* %\s+\d", done.stdout) and "worst case" in done.stdout
    assert re.search(r"pgd\s+L2\s+1\s", done.stdout)
    assert f"files      runs/{'/'.join(folder.parts[-5:])}" in done.stdout
    assert "wandb sync" in done.stdout and "training: 2," in done.stderr
    assert "\x1b[" not in done.stdout + done.stderr and "\r" not in done.stderr


def test_offline_file_of_wandb(finished):
    """Read back with W&B's own tool: config, grouping, per-epoch history, summary, table, pictures."""
    folder, _ = finished
    records = read_back(folder)
    (started,) = records["run"]
    assert started["job_type"] == "train"
    assert started["run_group"].startswith("digits/alicnn/sl/analysis.")
    assert {"digits", "alicnn", "sl", "pgd"} <= set(started["tags"])
    assert started["config"]["update"]["attack"]["pgd"]["steps"] == 5
    rows = [row for row in history(records) if "train/loss" in row]
    assert [row["epoch"] for row in rows] == [1, 2]
    wanted = {"reward", "accuracy", "grad_norm", "lr", "images_per_second"}
    assert all({f"train/{name}" for name in wanted} <= set(row) for row in rows)
    assert [row["epoch"] for row in history(records) if "val/accuracy" in row] == [1, 2]
    final, summary = wandb_summary(records), summary_of(folder)
    assert final["accuracy/clean"] == summary["clean_accuracy"]["value"]
    assert final["accuracy/pgd"] == summary["robust_accuracy"]["pgd"]
    assert final["accuracy/worst_case"] == summary["worst_case_accuracy"]["value"]
    assert final["status"] == "finished"
    (files,) = folder.glob("wandb/offline-run-*/files")
    table = json.loads((files / final["tables/attacks.path"]).read_text())
    assert [row[0] for row in table["data"]] == ["clean", "fgsm", "pgd", "worst case"]
    assert [(files / name).read_bytes()[:4] for name in final["figures/pictures.filenames"]] == [b"\x89PNG"]


def test_a_finished_run_is_shown_again_without_torch_and_renewed_on_request(launch, tmp_path):
    first = launch(*QUICK)
    folder = only_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    code = (
        "import sys, runpy; sys.argv = ['launch.py', *sys.argv[1:]]\n"
        f"runpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
        "assert 'torch' not in sys.modules"
    )
    again = subprocess.run([sys.executable, "-c", code, *QUICK], cwd=tmp_path, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert "already finished; overwrite=true" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert launch(*QUICK, "overwrite=true").returncode == 0
    assert all(path.stat().st_mtime_ns > before[path] for path in folder.rglob("*") if path.is_file())


def test_the_batch_size_changes_no_number_and_another_configuration_is_refused(launch, tmp_path):
    for name, size in (("a", 7), ("b", 40)):
        done = launch(*QUICK, f"name={name}", f"evaluation.batch_size={size}")
        assert done.returncode == 0, done.stderr
    weights = [torch.load(tmp_path / f"runs/{name}/checkpoints/last.pt")["model"] for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    outcomes = [dict(np.load(tmp_path / f"runs/{name}/outcomes.npz")) for name in "ab"]
    for key in ("clean_pred", "fgsm_pred", "pgd_pred"):
        assert np.array_equal(outcomes[0][key], outcomes[1][key]), key
    before = summary_of(tmp_path / "runs/a")
    done = launch(*QUICK, "name=a", "evaluation.batch_size=7", "trainer.batch_size=16")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: run folder runs/a: ")
    assert "trainer.batch_size is 32 there, 16 here" in line and "name=NAME" in line and "overwrite=true" in line
    assert summary_of(tmp_path / "runs/a") == before


def test_a_finished_training_goes_on_where_its_rates_allow_it(launch, tmp_path):
    """Twice 2 epochs are the 4 of one command, bit for bit, in the weights and in every number."""
    words = (*QUICK, "trainer=rl", "recipe=none", "trainer.schedule.warmup=0", "trainer.schedule.kind=constant")
    for name, epochs in (("whole", 4), ("parts", 2), ("parts", 4)):
        done = launch(*words, f"name={name}", f"trainer.epochs={epochs}")
        assert done.returncode == 0, done.stderr
    assert "trained for 2 epochs; going on to 4" in done.stderr
    whole, parts = (tmp_path / "runs" / name for name in ("whole", "parts"))
    weights = [torch.load(run / "checkpoints/last.pt")["model"] for run in (whole, parts)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    numbers = [
        [(r.metric, r.attack, r.step, r.value) for r in read_results(run / "results.jsonl") if "second" not in r.metric]
        for run in (whole, parts)
    ]
    assert numbers[0] == numbers[1] and summary_of(parts)["epochs"] == 4
    before = summary_of(parts)
    for more in (["trainer.epochs=3"], ["trainer.epochs=5", "trainer.batch_size=16"]):
        assert launch(*words, "name=parts", *more).returncode == 1
    done = launch(*words, "name=parts", "trainer.epochs=5", "trainer.schedule.kind=linear")
    assert done.returncode == 1 and "name=NAME checkpoint=runs/parts to train on" in done.stderr
    assert summary_of(parts) == before


def test_survivors_and_threat_model(launch, tmp_path):
    """Accuracies fall from one attack to the next down to the worst case; a larger eps is reported, but not counted."""
    words = ("trainer.epochs=2", "evaluation.samples=40", "eps=0.3", "logger=none", "analysis=none", "name=s")
    short = ("attack.pgd.steps=4", "attack.pgd_targeted.steps=4", "attack.autoattack.attacks=[apgd-ce]")
    done = launch(*words, *short, "attack=[suite,fgsm]", "attack.fgsm.eps=3", "attack.fgsm.step_size=3")
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "runs/s")
    info = summary["attacks"]
    assert list(info) == ["pgd", "pgd_targeted", "adaptive", "autoattack", "fgsm"]
    values = [info[name]["robust_accuracy"]["value"] for name in ("pgd", "pgd_targeted", "autoattack")]
    assert summary["clean_accuracy"]["value"] >= values[0] >= values[1] >= values[2] > 0
    assert summary["worst_case_accuracy"]["value"] == values[2]
    assert not info["fgsm"]["counts"] and info["fgsm"]["robust_accuracy"]["value"] < values[2]
    assert re.search(r"not in the worst case.*fgsm", done.stdout)
    outcomes = dict(np.load(tmp_path / "runs/s/outcomes.npz"))
    fooled_first = (outcomes["clean_pred"] == outcomes["label"]) & (outcomes["pgd_pred"] != outcomes["label"])
    assert fooled_first.any()
    for key in ("pred", "p", "l2", "linf"):  # samples that PGD fooled are not attacked again
        assert np.array_equal(outcomes[f"pgd_{key}"][fooled_first], outcomes[f"autoattack_{key}"][fooled_first])


def test_evaluating_a_run_takes_its_dataset_and_model_but_no_target(launch, tmp_path):
    rng = np.random.default_rng(0)
    images = {f"X_{part}": rng.integers(0, 256, (60, 9, 9), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "grey.npz", **images, y_train=np.arange(60) % 3, y_test=np.arange(60) % 3)
    words = ("dataset=npz", "dataset.path=grey.npz", "dataset.name=grey", "model=cnn", "model.net.width=0.05")
    done = launch(*words, *BARE, "name=trained")
    assert done.returncode == 0, done.stderr
    words = ("trainer=none", "checkpoint=runs/trained", *BARE[2:])
    done = launch(*words, "attack=pgd", "attack.pgd.steps=2")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    assert folder.parts[-5:-2] == ("grey", "cnn", "none")
    assert summary_of(folder)["clean_accuracy"] == summary_of(tmp_path / "runs/trained")["clean_accuracy"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"] is None
    assert summary_of(folder)["choices"] == {"dataset": "npz", "model": "cnn"}
    with contextlib.chdir(tmp_path):
        assert not [fault for check in verify(folder) for fault in check.faults]
    wrong = launch(*words, "model=alicnn", "attack=none")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("error: checkpoint=runs/trained/checkpoints/best.pt: is of another")
    forge(tmp_path / "runs/trained/config.yaml", lambda c: c["model"]["net"].update(_target_="os.getcwd"))
    refused = launch(*words, "attack=none")
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1 and "model.net._target_=os.getcwd, which is not allowed" in line


def test_multirun_folders_groups_and_failing_jobs(launch, tmp_path):
    done = launch("-m", "trainer=sl,rl", "seed=0,1", *BARE[:3])
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in (tmp_path / "runs").glob("*/*/*/*/*/summary.json")]
    assert len({summary_of(folder)["run_id"] for folder in folders}) == 4
    assert len({read_back(folder)["run"][0]["run_group"] for folder in folders}) == 2  # one for each trainer
    assert len(list((tmp_path / "runs").glob("**/*.wandb"))) == 4
    failing = launch("-m", "dataset.train_samples=9999,64", *BARE, "runs_dir=others")
    assert failing.returncode == 1
    assert "error: dataset.train_samples=9999: the training split has 1293 images" in failing.stderr
    assert "Traceback" not in failing.stderr
    assert len(list((tmp_path / "others").glob("*/*/*/*/seed0/summary.json"))) == 1
    stop = ("hydra.callbacks.manifest.stop_at_failure=true", "runs_dir=stopped")
    stopped = launch("-m", "dataset.train_samples=9999,64", *BARE, *stop)
    assert stopped.returncode == 1 and "2 jobs: 0 done, 1 failed, 1 left" in stopped.stdout
    assert not list((tmp_path / "stopped").rglob("summary.json"))


def test_full_disk(tmp_path, data_dir, launch):
    """Files may not grow beyond 1 MB: the checkpoint does not fit, the record of the failure does."""
    assert launch("prepare_data_only=true").returncode == 0
    words = (*BARE, "name=full")
    command = f'ulimit -f 1000; exec "{sys.executable}" "{ROOT / "launch.py"}" {" ".join(words)}'
    env = environment(data_dir, tmp_path)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"cannot write runs/full/checkpoints/\w+\.pt: File too large", line)
    folder = tmp_path / "runs/full"
    assert summary_of(folder)["status"] == "failed"
    assert "File too large" in summary_of(folder)["error"]
    assert "File too large" in (folder / "report.html").read_text()
    assert not list((folder / "checkpoints").iterdir())
    assert launch(*words).returncode == 0
    assert summary_of(folder)["status"] == "finished"


def test_prepare_data_only_prepares_and_stops(launch, tmp_path):
    done = launch("prepare_data_only=true", f"data_dir={tmp_path}/cache")
    assert done.returncode == 0
    assert "digits: 1293 train, 144 val and 360 test images of 1x8x8 are ready" in done.stderr
    assert list((tmp_path / "cache").rglob("meta.json"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run_on_a_gpu(launch, tmp_path, precision):
    """Training in either precision, attacks in fp32, and an evaluation with another batch size that agrees."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = ("hardware=cuda", "logger=none", "evaluation.samples=40")
    training = ("trainer=rl_adv", f"hardware.precision={precision}", "attack=[fgsm,pgd,autoattack]", "name=gpu")
    done = launch(*words, *training)
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "runs/gpu")
    assert summary["clean_accuracy"]["value"] > 0.8
    assert summary["worst_case_accuracy"]["value"] <= min(summary["robust_accuracy"].values())
    done = launch(*words, "trainer=none", "checkpoint=runs/gpu", "attack=pgd", "evaluation.batch_size=7", "name=again")
    assert done.returncode == 0, done.stderr
    again = summary_of(tmp_path / "runs/again")
    assert again["robust_accuracy"]["pgd"] == pytest.approx(summary["robust_accuracy"]["pgd"], abs=0.05)


def test_an_analysis_with_nothing_to_show_is_skipped(launch, tmp_path):
    words = ("trainer.epochs=1", "attack=none", "evaluation.samples=20", "logger=none", "name=few", "eps=0")
    done = launch(*words, "analysis=[norms,landscape,confusion]")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/few"
    assert set(summary_of(folder)["not_made"]) == {"norms", "landscape"}
    for name, reason in summary_of(folder)["not_made"].items():
        for text in (done.stderr, done.stdout, (folder / "report.html").read_text()):
            assert re.search(rf"{name}: .*{reason}", text)
    assert (folder / "figures/confusion.png").exists()


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, "evaluation"),
        pytest.param(signal.SIGTERM, "training", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "training", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "evaluation", marks=pytest.mark.slow),
    ],
)
def test_stopped_or_killed_and_repeated(tmp_path, data_dir, launch, moment, number):
    words = ("trainer=rl", "evaluation.samples=40", "analysis=none", "logger=none", "eps=0.3")
    if moment == "training":
        words += ("trainer.epochs=6", "attack=fgsm")
    else:
        words += ("trainer.epochs=1", "attack=[fgsm,autoattack]", "attack.autoattack.batch_size=6",
                  "attack.autoattack.queries=50")  # fmt: skip
    command = [sys.executable, "-c", FREQUENT, *words, "name=cut"]
    env = environment(data_dir, tmp_path)
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    wanted = "checkpoints/last.pt" if moment == "training" else "progress.npz"
    wait_for((tmp_path / "runs/cut" / wanted).exists, process)
    process.send_signal(number)
    log = process.communicate(timeout=120)[1]
    status = summary_of(tmp_path / "runs/cut")["status"]
    if number == signal.SIGTERM:
        assert (process.returncode, status) == (75, "stopped"), log
        assert "stopped by SIGTERM" in log and "Traceback" not in log
    else:
        assert status == "running"
    for name in ("cut", "whole"):
        done = launch(*words, f"name={name}")
        assert done.returncode == 0, done.stderr
    same_end(tmp_path / "runs/cut", tmp_path / "runs/whole")
    outcomes = [dict(np.load(tmp_path / f"runs/{name}/outcomes.npz")) for name in ("cut", "whole")]
    assert outcomes[0].keys() == outcomes[1].keys()
    assert all(np.array_equal(outcomes[0][key], outcomes[1][key]) for key in outcomes[1])


def test_no_file_and_no_output_holds_a_key(launch, tmp_path):
    secrets = {"WANDB_API_KEY": "5ec" + "a7e1d" * 7 + "00", "HF_TOKEN": "hf_" + "Tr0ub4dor" * 3}
    words = ("trainer.epochs=1", "attack=fgsm", "evaluation.samples=20", "analysis=pictures", "name=mine")
    done = launch(*words, "logger.mode=offline", **secrets)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        assert [path for path in files if secret.encode() in path.read_bytes()] == []

"""What a W&B project shows: read back from the offline record of two real runs, a training and an evaluation."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.runs import summary_of
from tests.test_wandb import environment, history, read_back

SWEEP = ROOT / "multirun_sweeps/wandb/bayes.yaml"
TRAIN = ("trainer=sl_adv", "trainer.epochs=2", "trainer.adversary.start_epoch=0", "dataset.train_samples=300",
         "evaluation.samples=12", "attack.autoattack.queries=20", "analysis.landscape.resolution=20",
         "analysis.gradients.steps=5",
         "attack.pgd.steps=5", "attack.pgd_targeted.steps=5", "analysis.masking.samples=6",
         "analysis.masking.steps=5", "analysis.masking.queries=5", "analysis.curve.samples=6",
         "analysis.curve.steps=5", "name=trained")  # fmt: skip
EVALUATE = ("trainer=none", "checkpoint=runs/trained", "attack=fgsm", "evaluation.samples=12", "name=evaluated",
            "analysis=[transfer_matrix,compare]", "analysis.transfer_matrix.runs=[runs/trained]",
            "analysis.compare.runs=[runs/trained]")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """The folders of a run that trained and of one that evaluated its model."""
    home = tmp_path_factory.mktemp("dashboards")
    env = environment(AERL_DATA=str(data_dir), HOME=str(home), MPLCONFIGDIR=str(data_dir / "matplotlib"))
    for words in (TRAIN, EVALUATE):
        command = [sys.executable, str(ROOT / "launch.py"), *words]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert "W&B" not in done.stderr
    return home / "runs/trained", home / "runs/evaluated"


def artifacts(folder):
    """The artifacts of a run by name, without those that W&B makes of tables by itself."""
    found = read_back(folder)["artifact"]
    return {artifact["name"]: artifact for artifact in found if artifact["type"] != "run_table"}


def local_paths(artifact):
    return {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}


@pytest.mark.slow
def test_model_and_outcomes_are_artifacts(runs):
    trained, _ = runs
    stored = summary_of(trained)
    found = artifacts(trained)
    assert set(found) == {f"model-{stored['run_id']}", f"outcomes-{stored['run_id']}"}
    model, outcomes = found[f"model-{stored['run_id']}"], found[f"outcomes-{stored['run_id']}"]
    assert (model["type"], outcomes["type"]) == ("model", "outcomes")
    assert not model.get("use_after_commit")
    metadata = json.loads(model["metadata"])
    assert all(metadata[key] == stored[key] for key in ("worst_case_accuracy", "clean_accuracy"))
    files = local_paths(model) | local_paths(outcomes)
    assert set(files) == {"checkpoints/best.pt", "config.yaml", "outcomes.npz", "summary.json"}
    for name, digest in {**metadata["sha256"], **json.loads(outcomes["metadata"])["sha256"]}.items():
        assert digest == hashlib.sha256(files[name].read_bytes()).hexdigest()
    # summary.json changes once more: what will be uploaded is the copy that was digested.
    copy = files.pop("summary.json")
    assert copy.is_relative_to(trained / "wandb") and json.loads(copy.read_text())["status"] == "finished"
    assert all(path == trained / name for name, path in files.items() if name != "outcomes.npz")


@pytest.mark.slow
def test_an_evaluated_model_is_the_artifact_of_its_run(runs):
    trained, evaluated = runs
    run_id = summary_of(trained)["run_id"]
    logged, used = (artifacts(folder)[f"model-{run_id}"] for folder in runs)
    assert used["use_after_commit"] is True and used["digest"] == logged["digest"]
    (started,) = read_back(evaluated)["run"]
    assert started["config"]["update"]["origin"]["run_id"] == run_id
    assert started["job_type"] == "evaluate" and {"sl_adv", "L2 eps 1"} <= set(started["tags"])


def test_the_group_is_the_run_without_its_seeds():
    from hydra import compose, initialize_config_dir

    from aerl.config.compose import read
    from aerl.config.names import group_name

    def group(*words):
        return group_name(read(compose("config", overrides=list(words))), words)

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert group("trainer=rl", "seed=3") == "digits/alicnn/rl/default"
        assert group("seed=0", "eps=0.5", "name=x") == group("seed=1", "eps=0.5") != group("seed=1")
        evaluated = [f"checkpoint=runs/digits/alicnn/sl/default/seed{seed}" for seed in (0, 12)]
        assert group("trainer=none", evaluated[0]) == group("trainer=none", evaluated[1])


# ------------------------------------------------------------------------------------------ W&B's sweeps


def test_every_value_of_the_wandb_sweep_composes():
    from hydra import compose, initialize_config_dir

    from aerl.build import build_recipe
    from aerl.config.compose import read

    sweep = yaml.safe_load(SWEEP.read_text())
    fixed = [word for word in sweep["command"] if not word.startswith("${")]
    assert sweep["metric"]["name"].startswith("val/") and "attack=none" in fixed
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for key, parameter in sweep["parameters"].items():
            for value in parameter.get("values") or (parameter["min"], parameter["max"]):
                build_recipe(read(compose("config", overrides=[*fixed, f"{key}={value}"])))


def test_a_job_of_the_wandb_sweep_runs_under_its_agent_and_logs_the_metric(tmp_path, data_dir):
    """The command as W&B's own code expands it, with what its agent puts into the environment."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEP.read_text())
    values = {key: p["values"][0] if "values" in p else p["min"] for key, p in sweep["parameters"].items()}
    values |= {"trainer.epochs": 1, "dataset.train_samples": 200, "logger.artifacts": False}
    given = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    given |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [str(ROOT / sweep["program"])]}
    words = create_sweep_command(sweep["command"])
    command = [part for word in words for part in (given[word[2:-1]] if word.startswith("${") else [word])]
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump({"wandb_version": 1}))
    extra = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    env = environment(AERL_DATA=str(data_dir), WANDB_SWEEP_PARAM_PATH=str(tmp_path / "parameters.yaml"), **extra)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "runs").rglob("*.wandb")
    folder = record.parents[2]
    records = read_back(folder)
    assert sweep["metric"]["name"] in {key for row in history(records) for key in row}
    assert records["run"][0]["run_id"] == "r1" and records["run"][0]["sweep_id"] == "s1"
    assert artifacts(folder) == {}
    assert os.fspath(folder).endswith("seed0")

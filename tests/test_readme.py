"""What the README says is so: its examples run, its tables name what exists, CI runs its test command."""

import os
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def test_the_attack_it_shows_works_as_one_file_and_one_yaml(tmp_path, data_dir):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "launch.py", tmp_path)
    (tmp_path / "my_attacks.py").write_text(block("python", "my_attacks.py"))
    (tmp_path / "conf/attack/uniform.yaml").write_text(block("yaml", "conf/attack/uniform.yaml"))
    env = {name: value for name, value in os.environ.items() if name != "AERL_ROOT"}
    env |= {"AERL_DATA": str(data_dir), "PYTHONPATH": str(ROOT)}
    words = ["attack=uniform", "norm=Linf", "eps=0.1", "trainer.epochs=1", "logger=none", "analysis=none"]
    command = [sys.executable, "launch.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"uniform\s+Linf\s+0\.1\s", done.stdout)
    wrong = subprocess.run([*command, "attack.uniform.eps=-1"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert wrong.stderr.strip() == "error: attack.uniform.eps=-1: should be greater than or equal to 0"


def test_its_table_of_groups_names_every_option():
    for group in ("dataset", "model", "trainer", "attack", "metric", "analysis", "hardware", "logger", "experiment"):
        (row,) = re.findall(rf"^\| `{group}`.*? \| (.*?) \|", TEXT, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    (row,) = re.findall(r"^\| `multirun_sweeps` \| (.*?) \|", TEXT, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {path.stem for path in (ROOT / "multirun_sweeps").glob("*.yaml")}


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_ci_runs_its_test_command():
    (extraction,) = re.findall(r"^test_command=\$\((.*)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    done = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(".venv/bin/python -m pytest")
    assert f"```\n{done.stdout.strip()}\n```" in TEXT

"""The README is right: its example runs, its tables name what exists, CI runs its test command."""

import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT, environment
from tests.runs import BARE

TEXT = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/reference.md", "docs/extend.md"))


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def test_its_attack_works_as_one_file_and_one_yaml(tmp_path, data_dir):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "launch.py", tmp_path)
    (tmp_path / "my_attacks.py").write_text(block("python", "my_attacks.py"))
    (tmp_path / "conf/attack/uniform.yaml").write_text(block("yaml", "conf/attack/uniform.yaml"))

    def launch(*words):
        command = [sys.executable, "launch.py", *BARE, "attack=uniform", "norm=Linf", "eps=0.1", *words]
        env = environment(data_dir, tmp_path, PYTHONPATH=str(ROOT))
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    assert re.search(r"uniform\s+Linf\s+0\.1\s", launch().stdout)
    wrong = launch("attack.uniform.eps=-1").stderr.strip()
    assert wrong == "error: attack.uniform.eps=-1: should be greater than or equal to 0"


def test_its_table_of_groups_names_every_option():
    for group in ("dataset", "model", "trainer", "attack", "metric", "analysis", "hardware", "logger", "experiment",
                  "multirun_sweeps"):  # fmt: skip
        (row,) = re.findall(rf"^\| `{group}`.*? \| (.*?) \|", TEXT, re.MULTILINE)
        folder = ROOT / group if group == "multirun_sweeps" else ROOT / "conf" / group
        assert set(re.findall(r"`(\w+)`", row)) == {path.stem for path in folder.glob("*.yaml")}


def test_ci_runs_its_test_command():
    (extraction,) = re.findall(r"^test_command=\$\((.*)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    done = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(".venv/bin/python -m pytest")
    assert f"```\n{done.stdout.strip()}\n```" in TEXT

"""The Python and the command lines of README, docs and notebooks run, from their text."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment
from tests.runs import BARE, finish

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRELUDE = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from sklearn.datasets import load_digits
from torch import nn
digits = load_digits()
images, labels = torch.tensor(digits.images[:6, None] / 16, dtype=torch.float32), torch.tensor(digits.target[:6])
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
RUN = "runs/r"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, data_dir):
    """A folder with a trained run in it, runs/r."""
    place = tmp_path_factory.mktemp("examples")
    finish(place, data_dir, *BARE[:1], "attack=fgsm", *BARE[2:], "name=r")
    return place


def python(code, place, data_dir):
    env = environment(data_dir, place, PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_python_of_a_page(name, home, data_dir):
    code = "\n".join(block for block in blocks(ROOT / name, "python") if "import aerl\n" in block or "aerl." in block)
    assert "aerl.evaluate(" in code
    done = python(PRELUDE + code, home, data_dir)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["judge_my_model", pytest.param("train_and_compare", marks=pytest.mark.slow)])
def test_a_notebook(name, home, data_dir):
    cells = json.loads((ROOT / f"examples/{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[-1:] if cell["cell_type"] == "code"), "has no outputs; run it"
    done = python("\n".join(code), home, data_dir)
    assert done.returncode == 0, done.stderr


def commands():
    """Every command line of launch.py, with its page."""
    for page in PAGES:
        for block in blocks(page, "(?:bash|sh)?"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if (match := re.match(r"(?:python|\.venv/bin/python) launch\.py (.*)", line)) and "..." not in line:
                    yield page.name, match[1]


CODE = """
import json, os, sys
import launch
from hydra import compose, initialize_config_dir
from aerl.build import check
from aerl.config.cli import prepare_words
from aerl.config.compose import read
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
for line in json.load(sys.stdin):
    words = [word for word in prepare_words(line) if word not in ("-m", "--multirun", "--frontier")]
    if any(word.startswith(("--", "-sc", "hydra/", "multirun_sweeps")) for word in words):
        continue
    parsed = OverridesParser.create().parse_overrides(words)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    for job in jobs:
        try:
            with initialize_config_dir(os.path.join(os.environ["AERL_ROOT"], "conf"), version_base="1.3"):
                check(read(compose("config", overrides=list(job))))
        except BaseException as error:
            sys.exit(f"{' '.join(line)}: {type(error).__name__}: {error}")
"""


def test_command_lines(home, data_dir):
    """Each is composed and checked as far as it goes without data, with a trained run for the names in capitals."""
    lines = []
    for _, line in commands():
        words = shlex.split(line, comments=True)
        lines.append([re.sub(r"\bRUN(_[A-Z])?\b|\bRUN_FOLDER\b|runs/(sl|rl|a|b)\b", "runs/r", word) for word in words])
    lines = [
        words
        for words in lines
        if not any(re.search(r"[A-Z]{4,}|my_|mine|uniform|robustbench|timm|\.pth", word) for word in words)
    ]
    assert len(lines) > 15
    env = environment(data_dir, home, PYTHONPATH=str(ROOT), AERL_ROOT=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps(lines), cwd=home, env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_links_of_the_readme_and_the_pages():
    """mkdocs checks those between pages; here also those of the README and to files."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

"""The closing table of a run, and the pictures."""

import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from aerl.analyses import AnalysisContext
from aerl.analyses.pictures import pictures
from aerl.evaluation.statistics import proportion
from aerl.report.table import headline, show
from aerl.runtime.device import Hardware
from aerl.tracking.results import ResultLog, write_summary
from tests.runs import on_a_terminal

SUMMARY = {
    "status": "finished", "run_id": "digits-alicnn-sl-0", "folder": "outputs/digits-alicnn-sl/seed=0",
    "dataset": "digits", "model": "alicnn", "trainer": "sl", "seed": 0, "config_hash": "ab12",
    "samples": 360, "epochs": 20, "clean_accuracy": proportion(353, 360),
    "attacks": {
        "fgsm": {"norm": "Linf", "eps": 8 / 255, "seconds": 0.1, "robust_accuracy": proportion(120, 360)},
        "pgd": {"norm": "L2", "eps": 1.0, "seconds": 132.4, "robust_accuracy": proportion(36, 360)},
    },
    "robust_accuracy": {"fgsm": 120 / 360, "pgd": 0.1}, "worst_case_accuracy": proportion(30, 360),
    "masking": None, "test_split": "test", "seconds": {"train": 21.04, "attack": 132.5}, "error": None,
    "wandb": {"mode": "offline", "path": "wandb/offline-run-1-x", "url": None},
}  # fmt: skip
REASONS = {"mechanism": "saturated softmax: p is 1 on 36 of 100 samples", "trust": "PGD on the log-odds"}


@pytest.fixture
def rows(capsys):
    """The closing table of a summary, split into cells."""

    def print_rows(**news):
        show(SUMMARY | news)
        return [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]

    return print_rows


# -------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("news", "expected"), [
    ({}, [
        ["digits, alicnn, sl, seed 0: finished"],
        ["clean", "98.1 %", "96.0 to 99.1 %", "360"],
        ["fgsm", "Linf", "8/255", "33.3 %", "28.7 to 38.4 %", "360", "0.1 s"],
        ["pgd", "L2", "1", "10.0 %", "7.3 to 13.5 %", "360", "2 min 12 s"],
        ["worst case", "8.3 %", "5.9 to 11.6 %", "360"],
        ["time", "training 21.0 s (20 epochs), attacks 2 min 12 s"],
        ["files", "outputs/digits-alicnn-sl/seed=0"],
        ["W&B", "offline; to upload: wandb sync outputs/digits-alicnn-sl/seed=0/wandb/offline-run-1-x"],
    ]),
    ({"clean_accuracy": proportion(0, 0) | {"value": None}}, [["clean", "-", "-", "-"]]),
    ({"status": "failed", "clean_accuracy": None, "attacks": {"pgd": {"norm": "L2", "eps": 0.5}},
      "error": "the loss is NaN in epoch 3"}, [
        ["digits, alicnn, sl, seed 0: failed"], ["the loss is NaN in epoch 3"], ["pgd", "L2", "0.5", "-", "-", "-"],
    ]),
    ({"attacks": {"pgd[a]": {"eps": 1 / 300, "seconds": 7322, "warnings": ["zero gradients"], "alone": False},
                  "fgsm": {"counts": False}}, "doubts": ["random"], "not_made": {"curve": "no attack"}}, [
        ["pgd[a]", "0.003333", "-", "-", "-", "2 h 02 min"], ["warning", "pgd[a]: zero gradients"],
        ["fgsm *", "-", "-", "-"], ["*", "outside the threat model (norm, eps, box), not in the worst case: fgsm"],
        ["warning", "model: random"], ["not made", "curve: no attack"],
        ["survivors", "each attack got only the samples that withstood those before it; accuracies are cumulative"],
    ]),
    ({"masking": {"verdict": "masked", **REASONS}}, [["masking", "masked"], *map(list, REASONS.items())]),
    ({"folder": "/scratch/" + "long/" * 60, "wandb": {"mode": "interrupted", "path": "wandb/it's"}}, [
        ["files", "/scratch/" + "/".join(["long"] * 60)],
        ["W&B", f"incomplete; to upload: wandb sync '/scratch/{'long/' * 60}wandb/it'\"'\"'s'"],
    ]),
], ids=["finished", "unmeasured", "failed", "notes", "masked", "long path"])  # fmt: skip
def test_table_of_a_run(rows, news, expected):
    found = rows(**news)
    assert [row for row in expected if row not in found] == []


def test_what_the_table_leaves_out(rows):
    labels = {row[0] for row in rows(worst_case_accuracy=None, masking={"verdict": "no sign", **REASONS})}
    assert "masking" in labels and not labels & {"worst case", "mechanism", "trust", "warning", "survivors"}
    online = {"mode": "online", "path": "wandb/run-1-x", "url": "https://example.org/runs/x"}
    assert [row for row in rows(wandb=online) if row[0] == "W&B"] == [["W&B", "https://example.org/runs/x"]]
    assert rows(origin={"trainer": "rl", "seed": 3})[1] == ["digits, alicnn, rl, seed 3, evaluated: finished"]


SHOW = """
import sys
from pathlib import Path
from aerl.report.table import headline, show
from aerl.tracking.results import read_summary
show(read_summary(Path(sys.argv[1])))
print({"torch", "numpy", "pandas", "wandb", "hydra"} & set(sys.modules), file=sys.stderr)
"""


def test_showing_a_run_imports_nothing_slow(tmp_path):
    write_summary(tmp_path, SUMMARY)
    command = [sys.executable, "-c", SHOW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "set()"
    assert "worst case" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(("variables", "colour"), [({"COLUMNS": "40"}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_and_a_narrow_window(tmp_path, variables, colour):
    write_summary(tmp_path, SUMMARY)
    screen = on_a_terminal(SHOW, str(tmp_path), **variables)
    assert ("\x1b[32mfinished" in screen) is bool(re.search(r"\x1b\[3\d", screen)) is colour
    assert "…" not in screen and "worst case" in screen and "98.1 %" in screen


# ---------------------------------------------------------------------------------------- the pictures


class Brightest(torch.nn.Module):
    """Classifies an image as its brightest column; in training mode as something else."""

    def forward(self, images):
        logits = 20 * images.mean(dim=(1, 2))
        return -logits if self.training else logits


def context(folder, channels=1, examples=6, attacks=1):
    """Ten images of a bright column each; attacks fool the model on the odd ones, the last is never right."""
    labels = torch.arange(10) % 8
    images = torch.zeros(10, channels, 8, 8, dtype=torch.uint8)
    images[torch.arange(10), :, :, labels] = 200
    adversarial = images.float() / 255
    adversarial[torch.arange(1, 10, 2), :, :, 7] = 1.0
    labels[9] = 5
    model = Brightest().eval()
    outcomes = {"label": labels.numpy()}
    names = [f"attack{index}" for index in range(attacks)]
    for name, x in {"clean": images.float() / 255, **dict.fromkeys(names, adversarial)}.items():
        confidence, pred = model(x).softmax(1).max(1)
        outcomes |= {f"{name}_pred": pred.numpy(), f"{name}_confidence": confidence.numpy()}
    return AnalysisContext(
        model=model.train(), images=images, labels=labels, class_names=tuple(f"column {index}" for index in range(8)),
        outcomes=outcomes, adversarial=dict.fromkeys(names, adversarial[:examples]),
        attacks={name: {"norm": "Linf", "eps": 8 / 255} for name in names},
        figures=folder / "figures", log=ResultLog(folder, {}), norm="Linf", eps=8 / 255, seed=0, trainer="sl",
        hardware=Hardware(torch.device("cpu")), batch_size=64, save=lambda **news: None,
    )  # fmt: skip


@pytest.mark.parametrize(("channels", "attacks", "samples"), [(1, 1, 8), (3, 2, 4), (2, 1, 1)])
def test_pictures_of_any_number_of_channels(tmp_path, channels, attacks, samples):
    given = context(tmp_path, channels=channels, attacks=attacks)
    assert pictures(given, samples=samples) == []
    image = Image.open(tmp_path / "figures" / "pictures.png")
    columns = min(samples, 6)
    assert image.size == pytest.approx((130 * (1.3 + 1.45 * columns), 130 * 6.1 * attacks), abs=2)
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # a right and a wrong answer, each framed
        assert (np.abs(pixels - np.array(colour)).max(axis=1) < 3).sum() > 50
    assert given.model.training  # as it was


def test_fooled_images_come_first(tmp_path):
    from aerl.analyses.pictures import _chosen, _title

    given = context(tmp_path, examples=10)
    assert _chosen(given, "attack0", 10) == [1, 3, 5, 0, 2, 4, 6, 7, 8, 9]
    assert _chosen(given, "attack0", 2) == [1, 3]
    assert _chosen(context(tmp_path, examples=4), "attack0", 8) == [1, 3, 0, 2]
    given.attacks["attack0"]["alone"] = False  # an attack on survivors shows none that was wrong before it
    assert _chosen(given, "attack0", 10) == [1, 3, 5, 0, 2, 4, 6, 7, 8]
    assert _title(given, "attack0") == "attack0, Linf eps 8/255"


@pytest.mark.parametrize("nothing", [{"examples": 0}, {"attacks": 0}])
def test_nothing_to_draw_is_a_warning(tmp_path, nothing, caplog):
    caplog.set_level(logging.WARNING, "aerl")
    assert pictures(context(tmp_path, **nothing)) == []
    assert "nothing to draw" in caplog.text
    assert not (tmp_path / "figures").exists()


JUDGED = {
    "worst_case_accuracy": {"value": 0.1, "low": 0.07, "high": 0.14, "n": 300},
    "attacks": {"pgd": {"of": "pgd", "norm": "L2", "eps": 0.5, "counts": True, "robust_accuracy": {"value": 0.1}}},
}
PLANTED = {"found": {"value": 0.97, "low": 0.91, "n": 100}, "trusted": True}
MASKED = {"verdict": "masked", "mechanism": "saturated softmax: p_y is 1"}
ADAPTIVE = {"of": "adaptive", "norm": "L2", "eps": 0.5, "counts": True, "robust_accuracy": {"value": 0.1}}
PAPER = {"of": "pgd_paper", "norm": "L2", "eps": 0.5, "counts": False, "robust_accuracy": {"value": 0.3}}


@pytest.mark.parametrize(("news", "attacks", "expected"), [
    ({"planted": PLANTED, "masking": {"verdict": "no sign"}}, {}, ["10.0 %", "relied on: the attack found 97 of 100"]),
    ({"planted": {"found": {"value": 1.0, "low": 0.2, "n": 1}, "trusted": True}}, {}, ["10.0 %", "is open: .*1 of 1"]),
    ({"planted": {"found": {"value": 0.4, "low": 0.3, "n": 100}, "trusted": False}}, {}, ["10.0 %", "not.*40 of 100"]),
    ({"masking": MASKED}, {}, ["10.0 %", "not rely on this number.*saturated softmax.*attack=suite"]),
    ({"masking": MASKED, "planted": PLANTED}, {"adaptive": ADAPTIVE}, ["10.0 %", "softmax.*97 of 100.*relied on"]),
    ({}, {"pgd_paper": PAPER}, ["paper's attack alone says 30.0 %", "10.0 %"]),
    ({"worst_case_accuracy": None}, {}, []),
])  # fmt: skip
def test_the_headline_says_the_number_and_whether_to_rely_on_it(news, attacks, expected):
    sentences = headline(JUDGED | news | {"attacks": JUDGED["attacks"] | attacks})
    assert len(sentences) == len(expected)
    assert all(re.search(pattern, sentence) for pattern, sentence in zip(expected, sentences, strict=True))

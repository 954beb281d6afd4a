"""The closing table of a run, its progress on the terminal, and the pictures."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from aerl.analyses import AnalysisContext
from aerl.analyses.pictures import pictures
from aerl.evaluation.statistics import proportion
from aerl.report.table import attack_grid, show
from aerl.runtime.device import Hardware
from aerl.tracking.results import ResultLog, write_summary

SUMMARY: dict[str, Any] = {
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


def shown(summary: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    show(summary, Console(file=stream, width=width))
    return stream.getvalue()


def rows(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


# -------------------------------------------------------------------------------------------- the table


def test_table_of_a_run() -> None:
    text = shown(SUMMARY)
    assert "digits, alicnn, sl, seed 0: finished" in text
    found = rows(text)
    for row in (
        ["clean", "98.1 %", "96.0 to 99.1 %", "360"],
        ["fgsm", "Linf", "8/255", "33.3 %", "28.7 to 38.4 %", "360", "0.1 s"],
        ["pgd", "L2", "1", "10.0 %", "7.3 to 13.5 %", "360", "2 min 12 s"],
        ["worst case", "8.3 %", "5.9 to 11.6 %", "360"],
        ["time", "training 21.0 s (20 epochs), attacks 2 min 12 s"],
        ["files", "outputs/digits-alicnn-sl/seed=0"],
    ):
        assert row in found
    assert "wandb sync outputs/digits-alicnn-sl/seed=0/wandb/offline-run-1-x\n" in text
    unmeasured = {**SUMMARY, "clean_accuracy": proportion(0, 0) | {"value": None}}
    assert ["clean", "-", "0.0 to 100.0 %", "0"] in rows(shown(unmeasured))
    assert len(attack_grid({}).rows) == 1


def test_table_fits_80_columns_and_paths_are_not_wrapped() -> None:
    long = {"norm": "Linf", "eps": 1 / 300, "seconds": 7322, "robust_accuracy": proportion(10_000, 10_000)}
    name = "pgd_margin_with_50_restarts_and[a]_very_long_name"
    folder = "/scratch/" + "long/" * 30
    wandb = {**SUMMARY["wandb"], "path": "wandb/it's"}
    text = shown({**SUMMARY, "folder": folder, "wandb": wandb, "attacks": {**SUMMARY["attacks"], name: long}})
    table = text[text.index("attack") : text.index("time  ")]
    assert max(len(line) for line in text[: text.index("files")].splitlines()) <= 80
    assert "\x1b" not in text and "…" not in text and "100.0 %" in table and "2 h 02 min" in table
    pieces = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert name in "".join(pieces)  # folded, not cut, and not read as markup
    assert f"{folder}\n" in text
    assert f"wandb sync '{folder}wandb/it'\"'\"'s'\n" in text


def test_failed_run_is_shown_as_failed() -> None:
    failed = {
        "status": "failed", "run_id": "r", "folder": "outputs/r", "dataset": "digits", "trainer": "rl",
        "seed": 0, "clean_accuracy": None, "attacks": {"pgd": {"norm": "L2", "eps": 0.5}},
        "error": "training: the loss is NaN in epoch 3, step 17",
    }  # fmt: skip
    text = shown(failed)
    assert "digits, rl, seed 0: failed" in text and failed["error"] in text
    assert ["pgd", "L2", "0.5", "-", "-", "-"] in rows(text)
    assert "worst case" not in text
    assert "run: running" in shown({"status": "running"})


def test_warnings_masking_and_wandb() -> None:
    attacks = {"pgd": {**SUMMARY["attacks"]["pgd"], "warnings": ["zero gradients on 12 % of the samples"]}}
    online = {"mode": "online", "path": "wandb/run-1-x", "url": "https://example.org/runs/x"}
    reasons = {"mechanism": "saturated softmax: p is 1 on 36 of 100 samples", "trust": "PGD on the log-odds"}
    found = rows(shown({**SUMMARY, "attacks": attacks, "wandb": online, "masking": {"verdict": "masked", **reasons}}))
    assert ["warning", "pgd: zero gradients on 12 % of the samples"] in found
    assert ["W&B", "https://example.org/runs/x"] in found
    assert all([key, text] in found for key, text in {"masking": "masked", **reasons}.items())
    assert "wandb sync" not in shown({**SUMMARY, "wandb": online})
    assert "incomplete; to upload: wandb sync" in shown({**SUMMARY, "wandb": {**online, "mode": "interrupted"}})
    honest = shown({**SUMMARY, "masking": {"verdict": "no sign", **reasons}})
    assert ["masking", "no sign"] in rows(honest) and "mechanism" not in honest


SHOW = """
import sys
from pathlib import Path
from aerl.report.table import show
from aerl.tracking.results import read_summary
show(read_summary(Path(sys.argv[1])))
print({"torch", "numpy", "pandas", "wandb", "hydra"} & set(sys.modules), file=sys.stderr)
"""


def test_showing_a_run_imports_nothing_slow(tmp_path: Path) -> None:
    write_summary(tmp_path, SUMMARY)
    command = [sys.executable, "-c", SHOW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "set()"
    assert "worst case" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(("variables", "colour"), [({"COLUMNS": "40"}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_and_a_narrow_window(tmp_path: Path, variables: dict[str, str], colour: bool) -> None:
    write_summary(tmp_path, SUMMARY)
    screen = on_a_terminal(SHOW, str(tmp_path), **variables)
    assert ("\x1b[32mfinished" in screen) is bool(re.search(r"\x1b\[3\d", screen)) is colour
    assert "…" not in screen and "worst case" in screen and "98.1 %" in screen


def on_a_terminal(code: str, *arguments: str, stdout: int | None = None, **variables: str) -> str:
    """What a program prints on a terminal of 80 columns: stderr, and stdout unless that goes elsewhere."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**env, "TERM": "xterm", "COLUMNS": "80", **variables},
        stdin=theirs, stdout=theirs if stdout is None else stdout, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 65536):
            screen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, screen.decode()
    return screen.decode()


# ---------------------------------------------------------------------------------------- the pictures


class Brightest(torch.nn.Module):
    """Says which column of the image is the brightest; in training mode nonsense."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = 20 * images.mean(dim=(1, 2))
        return -logits if self.training else logits


def context(folder: Path, channels: int = 1, kept: int = 6, attacks: int = 1) -> AnalysisContext:
    """Ten images of a bright column each; attacks fool the model on the odd ones, the last is never right."""
    labels = torch.arange(10) % 8
    images = torch.zeros(10, channels, 8, 8, dtype=torch.uint8)
    images[torch.arange(10), :, :, labels] = 200
    adversarial = images.float() / 255
    adversarial[torch.arange(1, 10, 2), :, :, 7] = 1.0
    labels[9] = 5
    model = Brightest()
    model.eval()
    outcomes = {"label": labels.numpy()}
    names = [f"attack{index}" for index in range(attacks)]
    for name, shown in {"clean": images.float() / 255, **dict.fromkeys(names, adversarial)}.items():
        confidence, pred = model(shown).softmax(1).max(1)
        outcomes |= {f"{name}_pred": pred.numpy(), f"{name}_confidence": confidence.numpy()}
    model.train()
    return AnalysisContext(
        model=model, images=images, labels=labels, class_names=tuple(f"column {index}" for index in range(8)),
        outcomes=outcomes, adversarial=dict.fromkeys(names, adversarial[:kept]),
        attacks={name: {"norm": "Linf", "eps": 8 / 255} for name in names},
        figures=folder / "figures", log=ResultLog(folder, {}), norm="Linf", eps=8 / 255, seed=0, trainer="sl",
        hardware=Hardware(torch.device("cpu")), batch_size=64, save=lambda **news: None,
    )  # fmt: skip


@pytest.mark.parametrize(("channels", "attacks", "samples"), [(1, 1, 8), (3, 2, 4), (2, 1, 1)])
def test_pictures_of_any_number_of_channels(tmp_path: Path, channels: int, attacks: int, samples: int) -> None:
    given = context(tmp_path, channels=channels, attacks=attacks)
    assert pictures(given, samples=samples) == []
    image = Image.open(tmp_path / "figures" / "pictures.png")
    columns = min(samples, 6)
    assert image.size == pytest.approx((130 * (1.3 + 1.45 * columns), 130 * 6.1 * attacks), abs=2)
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # a right and a wrong answer, each framed
        assert (np.abs(pixels - np.array(colour)).max(axis=1) < 3).sum() > 50
    assert given.model.training  # as it was


def test_fooled_images_come_first(tmp_path: Path) -> None:
    from aerl.analyses.pictures import _chosen, _title

    given = context(tmp_path, kept=10)
    assert _chosen(given, "attack0", 10) == [1, 3, 5, 0, 2, 4, 6, 7, 8, 9]
    assert _chosen(given, "attack0", 2) == [1, 3]
    assert _chosen(context(tmp_path, kept=4), "attack0", 8) == [1, 3, 0, 2]
    given.attacks["attack0"]["alone"] = False  # an attack on survivors shows none that was wrong before it
    assert _chosen(given, "attack0", 10) == [1, 3, 5, 0, 2, 4, 6, 7, 8]
    assert _title(given, "attack0") == "attack0, Linf eps 8/255"


@pytest.mark.parametrize("kept", [0, None])
def test_nothing_to_draw_is_a_warning(tmp_path: Path, kept: int | None, caplog: pytest.LogCaptureFixture) -> None:
    given = context(tmp_path, kept=0) if kept == 0 else context(tmp_path, attacks=0)
    with caplog.at_level(logging.WARNING, "aerl"):
        assert pictures(given) == []
    assert "nothing to draw" in caplog.text
    assert not (tmp_path / "figures").exists()

"""`python -m aerl.verify`: a run as it was written is verified, and one in which anything was changed is not."""

import json
import shutil

import numpy as np
import pytest
import torch

from aerl.build import build_data
from aerl.config.schema import Config
from aerl.data import subset
from aerl.runtime.files import load_arrays, save_arrays, sha256
from aerl.tracking.results import read_config, write_summary
from aerl.verify import main, verify
from tests.runs import finish

WORDS = ("evaluation.samples=60", "attack=[fgsm,pgd]", "attack.pgd.steps=5", "eps=0.6",
         "attack.fgsm.eps=0.2", "attack.fgsm.step_size=0.2", "analysis=none", "logger=none", "name=run")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    home = tmp_path_factory.mktemp("verify")
    finish(home, data_dir, *WORDS, "trainer.epochs=3")
    return home / "runs/run"


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def faults(folder):
    return {check.name: check.faults for check in verify(folder) if check.faults}


def seal(folder, **news):
    """As somebody does who changes a run and knows about all digests."""
    summary = json.loads((folder / "summary.json").read_text()) | news
    summary["files"] = {name: sha256(folder / name) for name in summary["files"]}
    write_summary(folder, summary)


def change(folder, name, edit):
    arrays = load_arrays(folder / name)
    edit(arrays)
    save_arrays(folder / name, arrays)
    seal(folder)


def test_a_run_as_it_was_written_is_verified(trained, capsys):
    assert main([str(trained)]) == 0
    shown = capsys.readouterr().out
    assert "run: verified" in shown and "misclassified" in shown
    evidence, outcomes = load_arrays(trained / "evidence.npz"), load_arrays(trained / "outcomes.npz")
    fooled = (outcomes["fgsm_pred"] != outcomes["label"]) | (outcomes["pgd_pred"] != outcomes["label"])
    fooled &= outcomes["clean_pred"] == outcomes["label"]
    assert np.array_equal(evidence["row"], np.flatnonzero(fooled)) and fooled.sum() > 5
    assert set(evidence["attack"]) == {"fgsm", "pgd"}


def outside_the_box(arrays):
    arrays["images"][0, 0, 0, 0] += 1.5


def outside_the_ball(arrays):
    arrays["images"][0] = np.clip(arrays["images"][0] + 0.2, 0, 1)


def another_label(arrays):
    arrays["label"][3] = (arrays["label"][3] + 1) % 10


def nobody_fooled(arrays):
    arrays["fgsm_pred"], arrays["pgd_pred"] = arrays["label"].copy(), arrays["label"].copy()


def another_prediction(arrays):
    arrays["clean_pred"][5] = (arrays["clean_pred"][5] + 3) % 10


@pytest.mark.parametrize(("name", "edit", "found"), [
    ("evidence.npz", outside_the_box, "evidence"),
    ("evidence.npz", outside_the_ball, "evidence"),
    ("outcomes.npz", another_label, "images"),
    ("outcomes.npz", nobody_fooled, "evidence"),
    ("outcomes.npz", another_prediction, "clean"),
])  # fmt: skip
def test_arrays_that_were_changed_are_found_though_their_digests_fit(copy, name, edit, found):
    change(copy, name, edit)
    assert found in faults(copy)


def test_a_clean_image_in_place_of_an_adversarial_one_is_found(copy):
    clean = subset(build_data(Config.model_validate(read_config(copy))).test, 60).images

    def replace(arrays):
        arrays["images"][0] = clean[arrays["row"][0]].numpy() / 255

    change(copy, "evidence.npz", replace)
    (fault,) = faults(copy)["evidence"]
    assert "classifies it correctly" in fault


def test_another_model_is_found(copy):
    path = copy / "checkpoints/best.pt"
    stored = torch.load(path, weights_only=True)
    for tensor in stored["model"].values() if "model" in stored else stored.values():
        if tensor.is_floating_point() and tensor.ndim == 2:
            tensor.mul_(-1)
    torch.save(stored, path)
    assert {"files", "weights"} <= set(faults(copy))
    summary = json.loads((copy / "summary.json").read_text())
    seal(copy, weights={**summary["weights"], "sha256": sha256(path)})
    assert "clean" in faults(copy)


def test_a_better_number_is_found(copy):
    better = json.loads((copy / "summary.json").read_text())["worst_case_accuracy"]
    better["value"] += 0.1
    seal(copy, worst_case_accuracy=better)
    assert {"accuracies", "results", "report"} <= set(faults(copy))


def test_a_better_report_is_found(copy):
    page, worst = copy / "report.html", json.loads((copy / "summary.json").read_text())["worst_case_accuracy"]
    text = page.read_text()
    assert f"{100 * worst['value']:.1f} %" in text
    page.write_text(text.replace(f"{100 * worst['value']:.1f} %", "99.9 %"))
    assert set(faults(copy)) == {"report"}


def test_changed_bytes_and_unfinished_runs_are_one_line_each(copy, tmp_path, capsys):
    with (copy / "examples.npz").open("r+b") as file:
        file.seek(200)
        file.write(b"x")
    assert main([str(copy)]) == 1
    assert "examples.npz was changed" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 1
    assert "no summary.json" in capsys.readouterr().err


def test_evidence_is_kept_on_request_and_not_needed_where_nothing_was_fooled(trained, data_dir, tmp_path):
    finish(tmp_path, data_dir, *WORDS, "trainer=none", f"checkpoint={trained}", "evaluation.evidence=false")
    (fault,) = faults(tmp_path / "runs/run")["evidence"]
    assert "evaluation.evidence=true" in fault
    finish(tmp_path, data_dir, *WORDS, "trainer=none", f"checkpoint={trained}", "eps=0", "name=still")
    assert faults(tmp_path / "runs/still") == {}

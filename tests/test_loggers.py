"""TensorBoard and CSV beside W&B: the numbers of results.jsonl, read back by the official reader."""

import csv

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aerl.tracking.loggers import Csv, Loggers, TensorBoard
from aerl.tracking.results import read_results
from tests.runs import finish


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return events, {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_a_run_with_three_loggers(tmp_path, data_dir):
    words = ["attack=fgsm", "analysis=masking", "analysis.masking.samples=10", "trainer.epochs=2", "name=run"]
    finish(tmp_path, data_dir, *words, "logger=[wandb,tensorboard,csv]")
    run = tmp_path / "runs/run"
    results = read_results(run / "results.jsonl")
    events, found = scalars(run)
    with (run / "csv/history.csv").open() as file:
        rows = {int(row["epoch"]): row for row in csv.DictReader(file)}
    for result in results:
        if result.step is not None:
            name = f"{result.split}/{result.metric}"
            assert found[name][result.step] == pytest.approx(result.value)
            assert float(rows[result.step][name]) == result.value
    (robust,) = (r.value for r in results if r.metric == "robust_accuracy")
    assert found["accuracy/fgsm"][0] == found["test/fgsm/robust_accuracy"][0] == pytest.approx(robust)
    assert "fgsm | L2 | 1.0" in events.Tensors("tables/attacks/text_summary")[0].tensor_proto.string_val[0].decode()
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"trainer.batch_size" in hparams and b"accuracy/" not in hparams
    with (run / "csv/attacks.csv").open() as file:
        assert [row["attack"] for row in csv.DictReader(file)] == ["clean", "fgsm", "worst case"]
    assert (run / "csv/masking.csv").read_bytes() == (run / "tables/masking.csv").read_bytes()
    assert list(run.glob("wandb/offline-run-*"))


def test_a_run_that_resumes_shows_each_epoch_once(tmp_path):
    first = Loggers(TensorBoard(tmp_path, {}), Csv(tmp_path))
    for epoch in (1, 2, 3):
        first.history(epoch, {"train/loss": 10.0 - epoch})
    again = Loggers(TensorBoard(tmp_path, {}), Csv(tmp_path))  # killed: epochs 2 and 3 come again
    for epoch in (2, 3, 4):
        again.history(epoch, {"train/loss": 20.0 - epoch, "val/loss": 1.0})
    again.finish(0)
    assert scalars(tmp_path)[1]["train/loss"] == {1: 9.0, 2: 18.0, 3: 17.0, 4: 16.0}
    with (tmp_path / "csv/history.csv").open() as file:
        rows = [(row["epoch"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]
    assert rows == [("1", "9.0", ""), ("2", "18.0", "1.0"), ("3", "17.0", "1.0"), ("4", "16.0", "1.0")]


def test_pictures_and_tables(tmp_path):
    board = TensorBoard(tmp_path, {})
    board.pictures("figures/x", [("an array", np.zeros((4, 5, 3), np.uint8)), ("grey", np.zeros((4, 5), np.uint8))])
    board.table("tables/t", ["a", "b"], [["x|y", None]])
    board.finish(0)
    events, _ = scalars(tmp_path)
    assert [(image.step, image.width, image.height) for image in events.Images("figures/x")] == [(0, 5, 4), (1, 5, 4)]
    assert "x\\|y" in events.Tensors("tables/t/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    for name in ("csv", "tensorboard"):
        (tmp_path / name).write_text("a file")
    loggers = Loggers(TensorBoard(tmp_path, {}), Csv(tmp_path))
    loggers.history(1, {"train/loss": 1.0})
    loggers.finish(1)
    said = [record.getMessage().partition(" (")[0].partition(": ")[0] for record in caplog.records]
    assert said == ["logger=tensorboard stopped", "logger=csv"]


def test_without_its_package_nothing_is_prepared(launch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['tensorboard'] = None\n")
    failed = launch("logger=tensorboard", PYTHONPATH=str(tmp_path))
    assert failed.returncode == 1 and "aerl[tensorboard]" in failed.stderr
    assert not (tmp_path / "runs").exists()

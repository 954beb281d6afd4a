"""The tables over runs and seeds, and report.html: a real multirun, and folders that are damaged on purpose."""

import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml

from aerl.config import names
from aerl.evaluation.statistics import proportion
from aerl.report import figures, page, runs
from aerl.report.__main__ import main
from aerl.tracking.results import read_results, read_summary, write_summary
from tests.conftest import ROOT
from tests.test_run_folder import config_of

# ------------------------------------------------------------------------------------- a real multirun


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data_dir):
    """Two settings and two seeds, of which the last job cannot have its folder."""
    home = tmp_path_factory.mktemp("swept")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"AERL_DATA": str(data_dir), "HOME": str(home), "MPLCONFIGDIR": str(data_dir / "matplotlib")}
    words = ["attack=[fgsm,pgd]", "attack.pgd.steps=3", "evaluation.samples=30", "dataset.train_samples=200",
             "analysis=none", "logger=none", "runs_dir=out"]  # fmt: skip
    last = ["trainer.epochs=2", "seed=1", *words]
    in_the_way = names.run_folder(home / "out", config_of(*last), last)
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    command = [sys.executable, str(ROOT / "launch.py"), "-m", "trainer.epochs=1,2", "seed=0,1", *words]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return home, done


def test_means_are_those_of_results_jsonl(swept):
    folders = runs.run_folders(swept[0] / "out")
    values = {}
    for folder in folders:
        epochs = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["epochs"]
        for result in read_results(folder / "results.jsonl"):
            known = {"clean_accuracy": "clean", "worst_case_accuracy": "worst_case", "robust_accuracy": result.attack}
            if result.split == "test" and result.metric in known:
                values.setdefault((str(epochs), known[result.metric]), []).append(100 * result.value)
    (table,) = runs.overview(folders).tables
    assert table.heading == "digits, L2 eps 1, 30 test images"
    assert table.text.columns == [
        "trainer",
        "trainer.epochs",
        "n",
        "clean",
        "fgsm",
        "pgd",
        "worst case",
        "95 % interval",
        "masking",
    ]
    numbers = table.numbers.set_index("trainer.epochs")
    assert sorted(map(len, values.values())) == [1] * 4 + [2] * 4
    for (epochs, name), measured in values.items():
        row = numbers.loc[epochs]
        assert row[f"{name}_n"] == len(measured)
        assert row[f"{name}_mean"] == pytest.approx(sum(measured) / len(measured))
        if len(measured) == 2:
            assert row[f"{name}_sd"] == pytest.approx(abs(measured[0] - measured[1]) / 2**0.5)


def test_multirun_ends_with_its_table_and_its_failed_jobs(swept):
    home, done = swept
    assert done.returncode == 1
    output = done.stdout[done.stdout.index("digits, L2 eps 1, 30 test images") :]
    assert re.search(r"^sl\s+1\s+2\s+[\d.]+ ± [\d.]+", output, re.MULTILINE)
    assert re.search(r"^sl\s+2\s+1\s+[\d.]+ ", output, re.MULTILINE)
    assert re.search(r"failed: job 3 \(trainer.epochs=2 seed=1\), .*: .*out/", output)
    folder = home / re.search(r"written: (.*)/report\.html", output)[1]
    assert folder.is_relative_to(home / "out/multirun")
    assert {path.name for path in folder.iterdir()} == {"jobs", "report.html", "table.csv", "table.md", "table.tex"}
    rows = pd.read_csv(folder / "table.csv")[["trainer", "trainer.epochs", "n", "clean_n"]]
    assert rows.to_numpy().tolist() == [["sl", 1, 2, 2], ["sl", 2, 1, 1]]
    html = (folder / "report.html").read_text()
    assert "failed: job 3" in html
    addresses = re.findall(r'href="([^"]*)"', html)
    assert len(addresses) == 3 and all((folder / unquote(address)).is_file() for address in addresses)


def test_report_needs_no_torch(swept, tmp_path):
    code = (
        "import sys; from aerl.report import status; from aerl.report.__main__ import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'hydra', 'omegaconf', 'matplotlib', 'wandb', 'scipy.stats'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(swept[0] / "out"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.stdout.splitlines()[-1], done.stderr) == ("[]", "")
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv", "table.tex", "report.html"}


# ------------------------------------------------------------------------------------ the same by hand

CONFIG = {
    "seed": 0, "norm": "L2", "eps": 1.0, "checkpoint": None, "runs_dir": "runs", "name": None,
    "dataset": {"name": "digits"}, "model": {"name": "alicnn", "net": {"width": 1}},
    "trainer": {"name": "sl", "epochs": 20}, "attack": {"pgd": {"steps": 10, "eps": 1.0}}, "analysis": {},
    "evaluation": {"samples": None}, "logger": {"mode": "auto"},
}  # fmt: skip


def make(folder, right=50, trainer="sl", seed=0, **news):
    """A run folder whose worst case is `right` of 100; `news` is for its summary, `config` for its config.yaml."""
    config = json.loads(json.dumps(CONFIG)) | {"seed": seed, "name": folder.name} | news.pop("config", {})
    if config["trainer"]:
        config["trainer"] = {"name": trainer} | {k: v for k, v in config["trainer"].items() if k != "name"}
    accuracy = proportion(right, 100)
    summary = {
        "status": "finished", "error": None, "run_id": folder.name, "seed": seed, "dataset": "digits",
        "model": "alicnn", "trainer": trainer, "origin": None, "clean_accuracy": proportion(90, 100),
        "attacks": {name: {"of": name, "norm": "L2", "eps": 1.0, "counts": True, "robust_accuracy": accuracy,
                           "seconds": 1.0, "warnings": []} for name in config["attack"]},
        "worst_case_accuracy": accuracy, "masking": {"verdict": "no sign"}, **news,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "outcomes.npz").touch()
    write_summary(folder, summary)
    return folder


def only_table(folder):
    (table,) = runs.overview(runs.run_folders(folder)).tables
    return table


def test_seeds_are_averaged_and_settings_of_other_trainers_are_no_column(tmp_path):
    for seed, right in enumerate((10, 20, 60)):
        make(tmp_path / f"sl{seed}", right, seed=seed)
        verdict = {"verdict": "masked" if seed else "no sign"}
        make(tmp_path / f"rl{seed}", right, "rl", seed, config={"trainer": {"epochs": 40}}, masking=verdict)
    table = only_table(tmp_path)
    assert table.text.columns == ["trainer", "n", "clean", "pgd", "worst case", "95 % interval", "masking"]
    accuracies = ["90.0 ± 0.0", "30.0 ± 26.5", "30.0 ± 26.5"]
    assert table.text.rows == [
        ["rl", "3", *accuracies, "-", "masked 2/3, no sign 1/3"], ["sl", "3", *accuracies, "-", "no sign 3/3"],
    ]  # fmt: skip
    make(tmp_path / "wide", config={"model": {"name": "alicnn", "net": {"width": 2}}}, seed=9)
    make(tmp_path / "longer", 50, "rl", 9, config={"trainer": {"epochs": 41}})
    make(tmp_path / "without", 50, "rl", 9, config={"trainer": {"epochs": 40, "act": None}})
    table = only_table(tmp_path)
    assert sorted(table.text.columns[:4]) == ["model.net.width", "n", "trainer", "trainer.epochs"]
    assert sorted(table.numbers["n"]) == [1, 1, 3, 4]  # a setting that is null is the same as none


def test_an_attack_that_not_all_seeds_have(tmp_path):
    for seed in (0, 1):
        make(tmp_path / f"transfer{seed}", 30, seed=seed)
        summary = read_summary(tmp_path / f"transfer{seed}")
        summary["attacks"] |= {f"transfer_sl_seed{seed}": summary["attacks"]["pgd"], f"only{seed}": {
            **summary["attacks"]["pgd"], "counts": False}}  # fmt: skip
        write_summary(tmp_path / f"transfer{seed}", summary)
    table = only_table(tmp_path)
    names = ["clean", "pgd", "transfer_sl_same_seed", "only0 *", "only1 *", "worst case"]
    assert table.text.columns == ["trainer", "n", *names, "95 % interval", "masking"]
    assert table.text.rows[0][5:7] == ["30.0 (n=1)", "30.0 (n=1)"]
    assert "only0 *, only1 *" in table.notes[0]


def test_evaluated_run_has_trainer_and_seed_of_its_model(tmp_path):
    for seed in (0, 1):
        for epochs in (20, 30):
            name = f"sl{seed}-{epochs}"
            config = {"trainer": {"epochs": epochs}, "attack": {}}
            origin = make(tmp_path / "trained" / name, seed=seed, config=config, worst_case_accuracy=None)
            make(
                tmp_path / "evaluated" / name, right=seed * 10, trainer="none", run_id=f"evaluated-{name}",
                origin={"folder": str(origin), "run_id": name, "trainer": "sl", "seed": seed},
                config={"trainer": None, "checkpoint": str(origin)},
            )  # fmt: skip
    for folder in (tmp_path / "evaluated", tmp_path):
        table = only_table(folder)
        assert "checkpoint" not in table.text.columns
        rows = table.numbers[table.numbers["worst_case_n"] > 0]
        assert list(rows["trainer"]) == ["sl", "sl"] and list(rows["trainer.epochs"]) == ["20", "30"]
        assert list(rows["n"]) == [2, 2] and list(rows["worst_case_mean"]) == pytest.approx([5, 5])


def test_other_runs_are_named_and_in_no_mean(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a/good", 40)
    make(tmp_path / "a/again", 90)  # the same seed once more
    make(tmp_path / "a/failed", 80, seed=1, status="failed", error="the loss is NaN\nin epoch 3")
    make(tmp_path / "a/killed", 80, seed=2, status="running")
    make(tmp_path / "a/other", 80, dataset="cifar10", seed=3)
    make(tmp_path / "a/linf", 80, config={"norm": "Linf", "eps": 8 / 255}, seed=4)
    make(tmp_path / "a/damaged", seed=5).joinpath("summary.json").write_text('{"status":')
    make(tmp_path / "a/halved", seed=6, clean_accuracy={"value": 0.5})
    make(tmp_path / "a/bare", seed=7).joinpath("config.yaml").unlink()
    make(tmp_path / "a/changed", 40, seed=9, files={"outcomes.npz": "0"})
    assert main(["a"]) == 0
    out = capsys.readouterr().out
    headings = ["cifar10, L2 eps 1, 100 test images", "digits, L2 eps 1, 100 test images",
                "digits, Linf eps 8/255, 100 test images"]  # fmt: skip
    assert [line for line in out.splitlines() if line.endswith("test images")] == headings
    for line in ("failed: a/failed: the loss is NaN in epoch 3", "running: a/killed: ", "not counted: a/good: ",
                 ".*a/damaged/summary", "a/halved: .*'n'", ".*a/bare/config", "a/changed: outcomes.npz"):  # fmt: skip
        assert len(re.findall(f"^{line}", out, re.MULTILINE)) == 1, line
    for name in ("table.md", "table.tex", "report.html"):
        text = (tmp_path / "a" / name).read_text()
        assert all(part in text for part in ("in epoch 3", "a/killed: ", "damaged", "a/good"))
    table = pd.read_csv(tmp_path / "a/table.csv")
    means = table[(table["dataset"] == "digits") & (table["norm"] == "L2")]["worst_case_mean"]
    assert list(means) == pytest.approx([65])  # of 90 and 40 alone


def test_no_run_is_exit_code_1_and_one_line(tmp_path, capsys):
    for folder, reason in ((tmp_path, "contains no run"), (tmp_path / "none", "no such folder")):
        assert main([str(folder)]) == 1
        assert capsys.readouterr() == ("", f"error: {folder}: {reason} (no summary.json)\n")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- the pages

EVIL = "<script>alert(1)</script> a|b & 100_% {x} \\ "


def test_no_text_of_a_run_becomes_markup(tmp_path):
    checks = [{"name": EVIL, "role": "effect", "value": None, "threshold": 0.1, "flag": True, "says": EVIL}]
    comparison = {"rows": {EVIL: {"accuracy": 0.5, "other_accuracy": 0.4, "difference": 0.1, "low": 0.0, "high": 0.2,
                                  "b": 3, "c": 1, "p": 0.01, "n": 9}}, "warnings": [EVIL]}  # fmt: skip
    evil = make(
        tmp_path / "set" / "<script>#?'\"", 40, EVIL, error=EVIL, doubts=[EVIL],
        masking={"verdict": EVIL, "mechanism": EVIL, "trust": EVIL, "n": 9, "checks": checks},
        comparisons={EVIL: comparison}, environment={"device": EVIL, EVIL: EVIL},
        wandb={"url": "javascript:alert(1)"}, config={"attack": {EVIL: {"steps": 1}}, "extra": EVIL},
    )  # fmt: skip
    make(tmp_path / "set" / "failed", status="failed", error=EVIL)
    assert main([str(tmp_path / "set")]) == 0
    for path in (evil / "report.html", tmp_path / "set/report.html"):
        html = path.read_text()
        assert "<script" not in html and "&lt;script&gt;" in html
        assert 'href="javascript' not in html
    (address,) = re.findall(r'<a href="([^"]*)">', (tmp_path / "set/report.html").read_text())
    assert address == "%3Cscript%3E%23%3F%27%22/report.html"
    tex = (tmp_path / "set/table.tex").read_text()
    assert r"100\_\% \{x\} \textbackslash" in tex and r"a|b \& " in tex
    table = [line for line in (tmp_path / "set/table.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_page_loads_nothing_and_holds_every_figure(swept):
    from matplotlib.figure import Figure

    folder = runs.run_folders(swept[0] / "out")[0]
    figures.save(Figure(figsize=(7, 1)), folder / "figures", "any_name", 'what it shows, ± 1 & "more"')
    html = page.write_run(folder).read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    (image,) = re.findall(r"<img [^>]*>", html)
    assert 'src="data:image/png;base64,' in image
    assert 'alt="any name: what it shows, ± 1 &amp; &#34;more&#34;"' in image
    assert f"epochs: {yaml.safe_load((folder / 'config.yaml').read_text())['trainer']['epochs']}" in html
    assert all(f"<dt>{label}</dt>" in html for label in ("python", "torch", "cpu", "time", "run id", "seed"))
    assert all(f'<th scope="row">{name}</th>' in html for name in ("clean", "fgsm", "pgd", "worst case"))
    addresses = re.findall(r'<a href="([^"]*)">', html)
    assert {"figures/any_name.pdf", "results.jsonl", "checkpoints/best.pt"} <= set(addresses)
    assert all((folder / unquote(address)).is_file() for address in addresses)


def test_the_frontier_is_drawn_for_each_table(tmp_path):
    for seed, right in enumerate((10, 20)):
        make(tmp_path / f"sl{seed}", right, seed=seed)
    make(tmp_path / "rl", 30, "rl", 0)
    make(tmp_path / "other", 30, "rl", 0, config={"eps": 0.5})
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--frontier"]) == 0
    for name in ("frontier", "frontier_2"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 5_000 and (tmp_path / f"out/{name}.pdf").is_file()

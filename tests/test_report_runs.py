"""The tables over runs and seeds, and report.html: a real multirun, and folders that are damaged on purpose."""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from aerl.config import names
from aerl.evaluation.statistics import proportion
from aerl.report import figures, page, runs
from aerl.report.__main__ import main
from aerl.tracking.results import read_results, write_summary
from tests.conftest import ROOT
from tests.test_run_folder import config_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# ------------------------------------------------------------------------------------- a real multirun


@pytest.fixture(scope="module")
def swept(tmp_path_factory, data_dir):
    """Two epochs and two seeds, and a third setting of epochs that cannot have its folder."""
    home = tmp_path_factory.mktemp("swept")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"AERL_DATA": str(data_dir), "HOME": str(home), "MPLCONFIGDIR": str(data_dir / "matplotlib")}
    words = ["-m", "trainer.epochs=1,2,3", "seed=0,1", "attack=[fgsm,pgd]", "attack.pgd.steps=3",
             "evaluation.samples=30", "analysis=none", "logger=none", "runs_dir=out"]  # fmt: skip
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    third = ["trainer.epochs=3", "seed=0", *words[3:]]
    in_the_way = (home / "out" / names.run_name(config_of(*third), third)).parent
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return home, done


def test_the_means_are_those_of_results_jsonl(swept):
    home, _ = swept
    found = runs.run_folders(home / "out")
    assert len(found) == 4
    by_hand: dict[Any, list[float]] = {}
    for folder in found:
        epochs = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["epochs"]
        for result in read_results(folder / "results.jsonl"):
            names = {"clean_accuracy": "clean", "worst_case_accuracy": "worst case"}
            name = names.get(result.metric) or (result.attack if result.metric == "robust_accuracy" else None)
            if name and result.split == "test":
                by_hand.setdefault((str(epochs), name), []).append(result.value)
    (section,) = runs.overview(found).sections
    assert section.heading == "digits, L2 eps 1, 30 test images"
    assert section.told == ["trainer", "trainer.epochs"]
    assert section.measured == ["clean", "fgsm", "pgd", "worst case"]
    assert len(by_hand) == 8 and {row.told["trainer.epochs"] for row in section.rows} == {"1", "2"}
    for row in section.rows:
        for name, spread in row.accuracies.items():
            values = by_hand[row.told["trainer.epochs"], name]
            assert spread is not None and spread.n == len(values) == 2
            assert spread.mean == pytest.approx(statistics.fmean(values))
            assert spread.sd == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_a_multirun_ends_with_its_table_and_with_the_jobs_that_left_no_folder(swept):
    home, done = swept
    assert done.returncode == 1
    table = done.stdout[done.stdout.index("digits, L2 eps 1, 30 test images") :]
    assert re.search(r"^sl\s+1\s+2\s+[\d.]+ ± [\d.]+", table, re.MULTILINE)
    assert re.search(r"^sl\s+2\s+2\s+[\d.]+ ± [\d.]+", table, re.MULTILINE)
    for job, seed in ((4, 0), (5, 1)):
        assert re.search(rf"failed: job {job} \(trainer.epochs=3 seed={seed}\), .*: cannot write out/", table)
    folder = home / re.search(r"written: (.*)/report\.html", table)[1]
    assert folder.is_relative_to(home / "out/multirun")
    assert {path.name for path in folder.iterdir()} == {
        "jobs", "report.html", "table.csv", "table.md", "table.tex",
    }  # fmt: skip
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["trainer"], row["trainer.epochs"], row["n"], row["clean_n"]) for row in rows] == [
        ("sl", "1", "2", "2"), ("sl", "2", "2", "2"),
    ]  # fmt: skip
    html = (folder / "report.html").read_text()
    assert "cannot write out/" in html and "2 without a result" in html
    for address in re.findall(r'href="([^"]*)"', html):
        assert (folder / unquote(address)).is_file(), address


def test_a_job_that_was_cut_is_told_until_it_is_done(launch, tmp_path):
    words = ("-m", "seed=0,1", "trainer.epochs=1", "attack=none", "analysis=none", "logger=none")
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os\nimport aerl.run\n"
        "real = aerl.run._train\n"
        "def train(parts, config, record):\n"
        "    if config.seed == 1: raise KeyboardInterrupt\n"
        "    real(parts, config, record)\n"
        "aerl.run._train = train\n"
        "import runpy, sys\n"
        f"sys.argv = ['launch.py', *sys.argv[1:]]\nrunpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
    )
    cut = subprocess.run(
        [sys.executable, str(killer), *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert cut.returncode == 130, cut.stderr
    assert re.search(r"^sl\s+1\s+\d", cut.stdout, re.MULTILINE)
    assert "unfinished: job 1 (seed=1), runs/digits" in cut.stdout
    again = launch(*words)
    assert again.returncode == 0
    assert re.search(r"^sl\s+2\s+[\d.]+ ± ", again.stdout, re.MULTILINE)
    assert "unfinished" not in again.stdout
    assert "2 jobs: 2 done, 0 failed, 0 left" in again.stdout


def test_it_imports_nothing_slow_and_says_what_is_wrong(swept, tmp_path):
    home, _ = swept
    code = (
        "import sys; from aerl.report.__main__ import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'hydra', 'omegaconf', 'matplotlib', 'wandb', 'numpy'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(home / "out"), str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr.splitlines() == [f"{tmp_path / 'none'}: no such folder (no summary.json)"]
    assert {"table.md", "table.csv", "table.tex", "report.html"} <= {path.name for path in tmp_path.iterdir()}


# ------------------------------------------------------------------------------------ the same by hand

CONFIG: dict[str, Any] = {
    "seed": 0, "norm": "L2", "eps": 1.0, "checkpoint": None, "runs_dir": "runs", "name": None,
    "dataset": {"name": "digits"}, "model": {"name": "alicnn", "net": {"width": 1}},
    "trainer": {"name": "sl", "epochs": 20}, "attack": {"pgd": {"steps": 10, "eps": 1.0}}, "analysis": {},
    "evaluation": {"samples": None}, "logger": {"mode": "auto"},
}  # fmt: skip


def make(folder: Path, right: int = 50, trainer: str = "sl", seed: int = 0, **news: Any) -> Path:
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


def test_what_a_trainers_name_tells_is_no_column_and_seeds_are_averaged(tmp_path):
    for seed, right in enumerate((10, 20, 60)):
        make(tmp_path / f"sl{seed}", right, seed=seed)
        make(tmp_path / f"rl{seed}", right, "rl", seed, config={"trainer": {"epochs": 40}},
             masking={"verdict": "masked" if seed else "no sign"})  # fmt: skip
    (section,) = runs.overview(runs.run_folders(tmp_path)).sections
    assert section.told == ["trainer"]
    accuracies = ["90.0 ± 0.0", "30.0 ± 26.5", "30.0 ± 26.5"]
    assert runs.cells(section, section.rows[1]) == ["sl", "3", *accuracies, "no sign 3/3"]
    assert section.rows[0].masking == "masked 2/3, no sign 1/3"
    make(tmp_path / "wide", config={"model": {"name": "alicnn", "net": {"width": 2}}}, seed=9)
    make(tmp_path / "longer", 50, "rl", 9, config={"trainer": {"epochs": 41}})
    (section,) = runs.overview(runs.run_folders(tmp_path)).sections
    assert sorted(section.told) == ["model.net.width", "trainer", "trainer.epochs"]
    assert sorted(len(row.runs) for row in section.rows) == [1, 1, 3, 3]


def test_a_judged_run_stands_under_the_trainer_and_the_seed_of_its_origin(tmp_path):
    origins = {}
    for seed in (0, 1):
        for epochs in (20, 30):
            name = f"sl{seed}-{epochs}"
            config = {"trainer": {"epochs": epochs}, "attack": {}}
            origins[name] = make(tmp_path / "trained" / name, seed=seed, config=config, worst_case_accuracy=None)
            make(
                tmp_path / "judged" / name, right=seed * 10, trainer="none", run_id=f"judged-{name}",
                origin={"folder": str(origins[name]), "run_id": name, "trainer": "sl", "seed": seed},
                config={"trainer": None, "checkpoint": str(origins[name])},
            )  # fmt: skip
    for folders in (runs.run_folders(tmp_path / "judged"), runs.run_folders(tmp_path)):
        seen = runs.overview(folders)
        judged = [row for row in seen.sections[0].rows if row.accuracies["worst case"]]
        assert [(row.told["trainer"], row.told["trainer.epochs"], len(row.runs)) for row in judged] == [
            ("sl", "20", 2), ("sl", "30", 2),
        ]  # fmt: skip
        assert all(row.accuracies["worst case"].mean == pytest.approx(0.05) for row in judged)
        assert "checkpoint" not in seen.sections[0].told


def test_transferred_examples_of_the_same_seed_share_a_column(tmp_path):
    for seed in (0, 1):
        folder = make(tmp_path / f"rl{seed}", 30, "rl", seed)
        summary = json.loads((folder / "summary.json").read_text())
        summary["attacks"] = {f"transfer_sl_seed{seed}": summary["attacks"]["pgd"]}
        write_summary(folder, summary)
    (section,) = runs.overview(runs.run_folders(tmp_path)).sections
    assert section.attacks == ["transfer_sl_same_seed"] and len(section.rows) == 1


def test_what_is_not_a_finished_run_is_told_and_in_no_mean(tmp_path, capsys, monkeypatch):
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
    make(tmp_path / "a/quiet", seed=8, config={"attack": {}}, worst_case_accuracy=None)
    make(tmp_path / "a/no_outcomes", 40, seed=9).joinpath("outcomes.npz").unlink()
    assert main(["a"]) == 0
    out, err = capsys.readouterr()
    headings = ["cifar10, L2 eps 1, 100 test images", "digits, L2 eps 1, 100 test images",
                "digits, Linf eps 8/255, 100 test images"]  # fmt: skip
    assert [line for line in out.splitlines() if line.endswith("test images")] == headings
    told = out.splitlines()
    assert "failed: a/failed: the loss is NaN in epoch 3" in told
    assert "unfinished: a/killed: running; its own command goes on with it" in told
    assert "not counted: a/good: seed 0 of its row is a/again" in told
    lines = err.splitlines()
    assert len(lines) == 6 + 1  # of the halved one there is no page either
    assert any(re.fullmatch(r"cannot read a/damaged/summary\.json: .*", line) for line in lines)
    assert "a/halved: its summary.json or config.yaml is damaged ('n' is missing)" in lines
    assert any("a/bare/config.yaml" in line for line in lines)
    assert "a/quiet: was attacked by nothing, so it has a clean accuracy only" in lines
    assert "a/no_outcomes: has no outcomes.npz; its numbers are those of summary.json" in lines
    assert "the runs differ in dataset and norm and eps: 3 tables, not to be compared" in lines
    for name in ("table.md", "table.tex", "report.html"):
        text = (tmp_path / "a" / name).read_text()
        assert "in epoch 3" in text and "running; its own command" in text and "damaged" in text
    with (tmp_path / "a/table.csv").open() as file:
        means = {(row["dataset"], row["norm"], row["attack"]): row["worst_case_mean"] for row in csv.DictReader(file)}
    assert float(means["digits", "L2", "pgd"]) == pytest.approx(65)  # of 90 and 40, and of nothing else


def test_no_run_is_exit_code_1_and_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {tmp_path}: holds no run (no summary.json)\n")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- the pages

EVIL = "<script>alert(1)</script> a|b & 100_% {x} \\ "


@pytest.fixture
def evil(tmp_path):
    """A run whose every text is hostile."""
    checks = [{"name": EVIL, "role": "effect", "value": None, "threshold": 0.1, "flag": True, "says": EVIL,
               "source": "", "seconds": 0.0, "passes": 0}]  # fmt: skip
    comparison = {"rows": {EVIL: {"accuracy": 0.5, "other_accuracy": 0.4, "difference": 0.1, "low": 0.0, "high": 0.2,
                                  "b": 3, "c": 1, "p": 0.01, "n": 9}}, "warnings": [EVIL]}  # fmt: skip
    folder = make(
        tmp_path / "set" / "<script>#?'\"", 40, EVIL, error=EVIL, doubts=[EVIL],
        masking={"verdict": "masked", "mechanism": EVIL, "trust": EVIL, "n": 9, "checks": checks},
        comparisons={EVIL: comparison}, environment={"device": EVIL, EVIL: EVIL},
        wandb={"url": "javascript:alert(1)"}, config={"attack": {EVIL: {"steps": 1}}, "extra": EVIL},
    )  # fmt: skip
    make(tmp_path / "set" / "failed", status="failed", error=EVIL)
    return folder


def test_nothing_that_a_run_says_becomes_markup(evil, tmp_path):
    assert main([str(tmp_path / "set")]) == 0
    for path in (evil / "report.html", tmp_path / "set/report.html"):
        html = path.read_text()
        assert "<script" not in html and "&lt;script&gt;" in html
        assert 'href="javascript' not in html
    (address,) = re.findall(r'<a href="([^"]*)">seed', (tmp_path / "set/report.html").read_text())
    assert address == "%3Cscript%3E%23%3F%27%22/report.html"
    tex = (tmp_path / "set/table.tex").read_text()
    assert r"100\_\% \{x\} \textbackslash{}" in tex and r"a|b \& " in tex
    table = [line for line in (tmp_path / "set/table.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


@pytest.fixture(scope="module")
def illustrated(swept):
    """One of the real runs, with a figure."""
    from matplotlib.figure import Figure

    folder = runs.run_folders(swept[0] / "out")[0]
    figure = Figure(figsize=(7, 1))
    figure.text(0, 0, "wide")
    figures.save(figure, folder / "figures", "any_name", 'what it shows, ± 1 & "more"')
    page.write_run(folder)
    return folder


def test_a_page_is_self_contained_and_holds_every_figure_with_its_caption(illustrated):
    html = (illustrated / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    (image,) = re.findall(r"<img [^>]*>", html)
    assert 'src="data:image/png;base64,' in image
    assert 'alt="any name: what it shows, ± 1 &amp; &#34;more&#34;"' in image
    told = yaml.safe_load((illustrated / "config.yaml").read_text())
    assert f"epochs: {told['trainer']['epochs']}" in html
    for label in ("python", "torch", "cpu", "time in all", "run id", "seed"):
        assert f"<dt>{label}</dt>" in html
    addresses = re.findall(r'<dt><a href="([^"]*)">', html)
    assert "figures/any_name.pdf" in addresses
    assert all((illustrated / unquote(address)).is_file() for address in addresses)


PROBE = """<!doctype html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;width:WIDTHpx;height:900px}</style>
<iframe src="PAGE"></iframe><pre id="told"></pre>
<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  document.getElementById("told").textContent = JSON.stringify({
    scroll: root.scrollWidth, inner: page.defaultView.innerWidth,
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor,
    ink: page.defaultView.getComputedStyle(page.body).color,
    broken: [...page.images].filter(image => !image.naturalWidth).length, images: page.images.length,
    headings: [...page.querySelectorAll("h1,h2,h3")].map(heading => +heading.tagName[1]),
    bare: [...page.querySelectorAll("th:not([scope])")].length,
  });
});</script>"""


def browse(path: Path, scratch: Path, width: int, *flags: str) -> dict[str, Any]:
    """What a real browser makes of a page in a window of that width."""
    wrapper = scratch / "probe.html"
    wrapper.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", path.as_uri()))
    profile = scratch / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={profile}", "--dump-dom", *flags, wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1])


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2, section 1.4.3, of two colours as rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome here")
def test_a_real_browser_shows_pages_on_a_phone_and_in_the_dark(swept, illustrated, evil, tmp_path):
    page.write_run(evil)
    (of_set,) = swept[0].glob("out/multirun/*/report.html")
    papers = []
    for path, width, flag in (
        (illustrated / "report.html", 360, "--blink-settings=preferredColorScheme=1"),
        (of_set, 360, "--blink-settings=preferredColorScheme=0"),
        (evil / "report.html", 360, "--blink-settings=preferredColorScheme=0"),
    ):
        told = browse(path, tmp_path, width, flag)
        assert told["inner"] == width and told["scroll"] <= width, path
        assert told["broken"] == 0 and told["images"] == (path.parent == illustrated)
        assert told["bare"] == 0 and told["headings"][0] == 1
        assert all(after <= before + 1 for before, after in zip(told["headings"], told["headings"][1:], strict=False))
        assert contrast(told["paper"], told["ink"]) > 7
        papers.append(told["paper"])
    assert papers[0] == "rgb(255, 255, 255)" != papers[1] == papers[2]

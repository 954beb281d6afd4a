"""The run folder against everything: damage, other processes, other content under old names, and overwrite=true."""

import contextlib
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from aerl.config import compose as compose_module
from aerl.config import names, targets
from aerl.report import page, runs
from aerl.runtime import files
from aerl.tracking import inputs, run_folder
from aerl.tracking.results import read_results, read_summary, write_summary
from aerl.types import UserError
from tests.conftest import ROOT
from tests.runs import summary_of

WORDS = (
    "trainer.epochs=1",
    "attack=fgsm",
    "evaluation.samples=20",
    "analysis=[pictures,entropy]",
    "logger=none",
)


@functools.cache
def config_of(*words):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose_module.read(compose("config", overrides=list(words)))


@pytest.fixture(scope="module")
def made(tmp_path_factory, data_dir):
    """A finished run."""
    home = tmp_path_factory.mktemp("made")
    env = {**os.environ, "AERL_DATA": str(data_dir), "MPLCONFIGDIR": str(data_dir / "matplotlib")}
    command = [sys.executable, str(ROOT / "launch.py"), *WORDS, "name=r"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "runs/r"


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(made, tmp_path / "runs/r")
    return tmp_path / "runs/r"


def found(folder, *words):
    """What the same command would go on with."""
    config = config_of(*WORDS, *words)
    earlier = run_folder.load_previous(folder, config)
    return run_folder.verify(folder, earlier) if earlier.get("status") == "finished" else earlier


# ------------------------------------------------------------------------------------------- damage


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def make_unreadable(path):  # also for root: a link in a circle
    path.unlink()
    path.symlink_to(path.name)


def flip(path, tenth):
    content = bytearray(path.read_bytes())
    content[(len(content) - 1) * tenth // 9] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "a folder": replace_by_folder,
    "unreadable": make_unreadable,
    **{f"flipped at {tenth}/9": lambda path, tenth=tenth: flip(path, tenth) for tenth in (0, 4, 9)},
}
AGAIN = {  # what is measured or made again, and what of the summary is then forgotten
    "outcomes.npz": "attacks", "examples.npz": "attacks", "figures/pictures.png": "analyses",
    "figures/entropy.pdf": "analyses", "tables/entropy.csv": "analyses", "config.yaml": None,
}  # fmt: skip
LOST = ("summary.json", "results.jsonl", "checkpoints/best.pt", "checkpoints/last.pt")


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damaged_file_of_a_finished_run_is_believed(run, damage, caplog):
    caplog.set_level("WARNING", logger="aerl")
    assert found(run)["status"] == "finished"
    kept = {name: run.parent / name.replace("/", "_") for name in (*AGAIN, *LOST)}
    for name, copy in kept.items():
        shutil.copy(run / name, copy)
        DAMAGE[damage](run / name)
        caplog.clear()
        if name in AGAIN:
            summary = found(run)
            assert summary["status"] == "running" and name in caplog.text
            assert AGAIN[name] is None or summary[AGAIN[name]] == {}
        else:
            with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
                found(run)
            assert "\n" not in str(error.value)
        # Tables over runs, and other runs that take this one, believe no more.
        if name in ("summary.json", "config.yaml", "outcomes.npz", "results.jsonl"):
            assert any(name in line for line in runs.overview([run]).warnings), name
        if name in ("summary.json", "config.yaml"):
            with pytest.raises(UserError):
                compose_module.of_run(str(run), "sources")
        page_of(run)
        if (run / name).is_dir():
            (run / name).rmdir()
        (run / name).unlink(missing_ok=True)
        shutil.copy(copy, run / name)


def page_of(folder):
    with contextlib.suppress(UserError):  # one line, or a page; never another exception
        page.write_run(folder)


def test_edited_numbers_are_no_numbers(run):
    """Also where the edit is well-formed."""
    arrays = dict(np.load(run / "outcomes.npz"))
    arrays["fgsm_pred"][:] = arrays["label"]
    np.savez(run / "outcomes.npz", **arrays)
    with pytest.raises(UserError, match=r"outcomes\.npz: is not as aerl wrote it"):
        files.load_arrays(run / "outcomes.npz")
    summary = json.loads((run / "summary.json").read_text())
    summary["worst_case_accuracy"]["value"] = 1.0
    for seal in (summary["seal"], None):
        (run / "summary.json").write_text(json.dumps({**summary, "seal": seal}))
        with pytest.raises(UserError, match=r"summary\.json: is not as aerl wrote it"):
            read_summary(run)


def test_a_run_without_its_summary_gets_no_second_id(run):
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"its summary\.json is missing; restore it, or overwrite=true"):
        found(run)


def test_what_is_damaged_and_can_be_measured_again_is(launch, run, tmp_path):
    before = {path: path.read_bytes() for path in (run / "outcomes.npz", run / "tables/entropy.csv")}
    results = [result for result in read_results(run / "results.jsonl") if result.metric != "seconds"]
    for path in before:
        path.write_bytes(b"")
    done = launch(*WORDS, "name=r")
    assert done.returncode == 0, done.stderr
    assert "made again: outcomes.npz, tables/entropy.csv" in done.stderr
    assert "training:" not in done.stderr and "fgsm: " in done.stderr
    assert before == {path: path.read_bytes() for path in before}
    assert results == [r for r in read_results(run / "results.jsonl") if r.metric != "seconds"]


def test_links_out_of_a_foreign_run_folder_are_not_followed(run, tmp_path, caplog):
    from PIL import Image

    Image.new("L", (9, 9)).save(tmp_path / "private.png")
    (run / "figures/pictures.png").unlink()
    (run / "figures/pictures.png").symlink_to(tmp_path / "private.png")
    png = bytearray((tmp_path / "private.png").read_bytes())
    png[16:24] = struct.pack(">II", 40_000, 40_000)  # the header's size, and its checksum
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (run / "figures/huge.png").write_bytes(png)
    html = page.write_run(run).read_text()
    assert "pictures.png" in caplog.text and "huge.png" in caplog.text and 'alt="entropy' in html
    assert 'alt="pictures' not in html and 'alt="huge' not in html
    (tmp_path / "secret.yaml").write_text("password: 1")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(UserError, match="is a link out of"):
        page.write_run(run)
    (tmp_path / "linked").symlink_to(run.parent)  # a user's own
    assert read_summary(tmp_path / "linked/r")["status"] == "finished"


# ------------------------------------------------------------------------------------- what a run reads


@pytest.mark.slow
def test_a_model_that_was_trained_again_is_another_model(launch, run, tmp_path):
    words = ("trainer=none", "checkpoint=runs/r", *WORDS[1:3], "attack=none", "analysis=none", "logger=none")
    first = launch(*words, "name=j")
    assert first.returncode == 0, first.stderr
    done = launch(*WORDS, "name=r", "overwrite=true", "trainer.epochs=2", "attack=none", "analysis=none")
    assert done.returncode == 0, done.stderr
    again = launch(*words, "name=j")
    assert again.returncode == 1 and "clean" not in again.stdout
    assert again.stderr.startswith("error: run folder runs/j: checkpoint=runs/r has changed: it was ")
    swept = launch("-m", *words, "name=j", "seed=0")
    assert swept.returncode == 1 and "checkpoint=runs/r has changed" in swept.stderr
    truth = launch(*words, "name=j", "overwrite=true")
    assert truth.returncode == 0 and truth.stdout.split("worst")[0] != first.stdout.split("worst")[0]
    accuracies = [summary_of(tmp_path / "runs" / name)["clean_accuracy"] for name in "jr"]
    assert accuracies[0] == accuracies[1]
    shutil.rmtree(tmp_path / "runs/r")  # the numbers are still those of what it was
    shown = launch(*words, "name=j")
    assert shown.returncode == 0 and "checkpoint=runs/r is not there any more" in shown.stderr
    assert shown.stdout == truth.stdout


def test_runs_files_and_code_count_by_their_content(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("weights.pt").write_bytes(b"1")
    Path("patch.npy").write_bytes(b"1")
    Path("ours").mkdir()
    Path("ours/__init__.py").write_text("")
    Path("ours/helper.py").write_text("STRENGTH = 1")
    Path("ours/attack.py").write_text(
        "from ours import helper\ndef grey(model, x, y, *, generator, patch=None): return x"
    )
    config = config_of(
        "trainer=none", "model=foreign", "model.mean=[0]", "model.std=[1]", "checkpoint=weights.pt",
        "model.net._target_=torchvision.models.resnet18", "attack=[transfer]", "analysis=[compare]",
        "attack.transfer.sources=[runs/r]", "analysis.compare.runs=[runs/r]",
        "+attack.grey={_target_: ours.attack.grey, patch: patch.npy}",
    )  # fmt: skip
    targets.bind(config.attack["grey"], "attack.grey", later=["model", "x", "y", "generator"])
    read = inputs.files(config) | inputs.code(config)
    assert {key for key in read if not key.startswith("package ")} == {
        "checkpoint=weights.pt", "attack.transfer.sources=runs/r", "analysis.compare.runs=runs/r",
        "attack.grey.patch=patch.npy", "code ours/__init__.py", "code ours/helper.py", "code ours/attack.py",
    }  # fmt: skip
    assert inputs.changed(read, inputs.now(read, config)) is None
    changes = {
        "checkpoint=weights.pt": Path("weights.pt"), "attack.transfer.sources=runs/r": run / "checkpoints/best.pt",
        "analysis.compare.runs=runs/r": run / "outcomes.npz", "attack.grey.patch=patch.npy": Path("patch.npy"),
        "code ours/helper.py": Path("ours/helper.py"),
    }  # fmt: skip
    for key, path in changes.items():
        content, status = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + b"#")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert str(inputs.changed(read, inputs.now(read, config))).startswith(f"{key} has changed"), key
        path.write_bytes(content)
    now = inputs.now({**read, "package torchvision": "0.1"}, config)
    assert str(inputs.changed({"package torchvision": "0.1"}, now)).startswith("package torchvision has changed")


# ----------------------------------------------------------------------------------------- overwrite=true


def test_overwrite_discards_what_aerl_wrote_and_nothing_else(run, tmp_path):
    for words in ((), ("overwrite=true",)):
        (tmp_path / "runs/data").mkdir(exist_ok=True)
        (tmp_path / "runs/data/thesis.txt").write_text("three years of work")
        with pytest.raises(UserError, match=r"runs/data: holds other files \(thesis\.txt\) and no run"):
            found(tmp_path / "runs/data", *words)
        with pytest.raises(UserError, match=r"runs: holds other files \(data, r\) and no run"):
            found(tmp_path / "runs", *words)
    (run / "notes.txt").write_text("mine")
    (run / "child").mkdir()
    assert found(run, "overwrite=true") == {"status": "discarded"}
    run_folder._discard(run, {"status": "discarded", "config_hash": "0"})
    assert sorted(path.name for path in run.iterdir()) == ["child", "notes.txt", "summary.json"]


def test_overwrite_that_was_killed_goes_on_and_is_used_up_once(run):
    """Whatever of the folder is left, nothing of it is taken for a run; a stopped run is not begun again."""
    own = read_summary(run)
    begun = {**own, "status": "discarded", "wish": "single"}
    write_summary(run, begun)
    (run / "checkpoints/best.pt").unlink()
    for words in ((), ("overwrite=true",)):
        assert found(run, *words)["status"] == "discarded"
    for status, goes_on in (("running", True), ("stopped", True), ("failed", False), ("finished", False)):
        write_summary(run, {**own, "status": status, "wish": "single", "files": {}})
        assert (found(run, "overwrite=true")["status"] == status) is goes_on, status
        write_summary(run, {**own, "status": status, "wish": None, "files": {}})
        assert found(run, "overwrite=true")["status"] == "discarded"
    config = config_of(*WORDS, "overwrite=true")  # in a multirun, also what is finished stays until all are
    write_summary(run, {**own, "wish": "a"})
    assert run_folder.load_previous(run, config, "a")["status"] == "finished"
    assert run_folder.load_previous(run, config, "b")["status"] == "discarded"


@pytest.mark.slow
def test_a_multirun_overwrites_each_of_its_runs_once(launch, tmp_path):
    """Its second job fails; repeated, it does that alone, and repeated once more it begins again with all."""
    words = (
        "-m",
        "seed=0,1",
        "trainer.epochs=1",
        "attack=none",
        "analysis=none",
        "logger=none",
        "overwrite=true",
    )
    (tmp_path / "runs/digits/alicnn/sl").mkdir(parents=True)
    blocked = next(iter([tmp_path / f"runs/{names.run_name(config_of(*words[2:-1], 'seed=1'), words[2:-1])}"]))
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    first = launch(*words)
    assert first.returncode == 1 and "1 done, 1 failed" in first.stdout, first.stdout
    blocked.unlink()
    done = blocked.with_name("seed0") / "summary.json"
    ids = [json.loads(done.read_text())["run_id"]]
    again = launch(*words)
    assert again.returncode == 0 and "already finished" in again.stderr, again.stderr
    ids.append(json.loads(done.read_text())["run_id"])
    assert launch(*words).returncode == 0
    ids.append(json.loads(done.read_text())["run_id"])
    assert ids[0] == ids[1] != ids[2]


# ------------------------------------------------------------------------------------- several processes

HOLD = """
import sys, time
from pathlib import Path
from aerl.runtime.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_lock_says_who_holds_it_and_ends_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.5)
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is at work in it"), files.locked(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.locked(folder):
        assert (folder / ".lock").exists()
    assert not folder.exists()


def test_a_file_system_without_locks_keeps_nobody_waiting(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    began = time.monotonic()
    with files.locked(tmp_path / "run"):
        (tmp_path / "run/file").touch()
    assert time.monotonic() - began < 1 and "has no locks" in caplog.text


def test_the_same_run_twice_at_once_is_one_run(tmp_path, data_dir):
    words = ("trainer.epochs=3", "attack=fgsm", "analysis=none", "logger=none", "name=twin")
    env = {**os.environ, "AERL_DATA": str(data_dir)}
    both = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), *words], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert sum("training:" in err for _, err in ends) == 1
    results = read_results(tmp_path / "runs/twin/results.jsonl")
    assert len({result.run_id for result in results}) == 1
    assert len({(r.metric, r.split, r.attack, r.step) for r in results}) == len(results)


# ---------------------------------------------------------------------------------------------- analyses


def test_an_analysis_that_fails_is_repeated_alone(launch, tmp_path):
    (tmp_path / "broken.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path
            def broken(context):
                context.log.log({"half": context.batch_size}, n=1, split="test", attack="broken")
                if context.batch_size > 8: raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
                if not Path("mended").exists(): raise ZeroDivisionError("of mine")
                context.log.log({"whole": 1}, n=1, split="test", attack="broken")
            """
        )
    )
    words = (*WORDS, "analysis=[entropy]", "+analysis.broken={_target_: broken.broken}", "name=r")
    words = (*words, "+analysis.last={_target_: aerl.analyses.outcomes.norms}", "evaluation.batch_size=32")
    first = launch(*words, PYTHONPATH=str(tmp_path))
    assert first.returncode == 0, first.stderr
    summary = summary_of(tmp_path / "runs/r")
    assert summary["status"] == "finished"
    assert {name: row["status"] for name, row in summary["analyses"].items()} == {
        "entropy": "made", "broken": "failed", "last": "made"
    }  # fmt: skip
    assert "ZeroDivisionError: of mine" in first.stdout and "Traceback" not in first.stdout + first.stderr
    assert "broken: out of memory: goes on with 16 images at a time" in first.stderr
    assert "ZeroDivisionError" in (tmp_path / "runs/r/run.log").read_text()
    (tmp_path / "mended").touch()
    again = launch(*words, PYTHONPATH=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert "fgsm: " not in again.stderr.replace("fgsm: was done", "") and "entropy: was made before" in again.stderr
    summary = summary_of(tmp_path / "runs/r")
    assert summary["analyses"]["broken"]["status"] == "made" and summary["not_made"] == {}
    results = read_results(tmp_path / "runs/r/results.jsonl")
    assert [(r.metric, r.value) for r in results if r.attack == "broken"] == [("half", 8.0), ("whole", 1.0)]
    assert len({(r.metric, r.split, r.attack, r.step) for r in results}) == len(results)

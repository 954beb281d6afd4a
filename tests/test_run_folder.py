"""The run folder: damage, other processes, changed inputs, and overwrite=true."""

import contextlib
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from aerl.config import compose as compose_module
from aerl.config import names, targets
from aerl.errors import UserError
from aerl.report import page, runs
from aerl.runtime import files
from aerl.tracking import inputs, run_folder
from aerl.tracking.results import read_results, read_summary, write_summary
from tests.conftest import ROOT
from tests.runs import begin, ended, results_of, summary_of

WORDS = ("trainer.epochs=1", "attack=fgsm", "evaluation.samples=20", "analysis=[pictures,entropy]", "logger=none")


@functools.cache
def config_of(*words):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose_module.read(compose("config", overrides=list(words)))


@pytest.fixture(scope="module")
def original(tmp_path_factory, data_dir):
    """A finished run."""
    home = tmp_path_factory.mktemp("original")
    done = ended(begin(home, data_dir, *WORDS, "name=r"))
    assert done.returncode == 0, done.stderr
    return home / "runs/r"


@pytest.fixture
def run(original, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(original, tmp_path / "runs/r")
    return tmp_path / "runs/r"


def found(folder, *words):
    """The summary that the same command would resume."""
    config = config_of(*WORDS, *words)
    earlier = run_folder.load_previous(folder, config)
    return run_folder.verify(folder, earlier) if earlier.get("status") == "finished" else earlier


# ------------------------------------------------------------------------------------------- damage


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_circular_link(path):  # unreadable also for root
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
    "a link": replace_by_circular_link,
    **{f"flipped at {tenth}/9": lambda path, tenth=tenth: flip(path, tenth) for tenth in (0, 4, 9)},
}
AGAIN = {  # what is measured again, and what of the summary is then removed
    "outcomes.npz": "attacks", "examples.npz": "attacks", "figures/pictures.png": "analyses",
    "figures/entropy.pdf": "analyses", "tables/entropy.csv": "analyses", "config.yaml": None,
}  # fmt: skip
LOST = ("summary.json", "results.jsonl", "checkpoints/best.pt", "checkpoints/last.pt")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_a_finished_run_are_not_used(run, damage, caplog):
    caplog.set_level("WARNING", logger="aerl")
    assert found(run)["status"] == "finished"
    copies = {name: run.parent / name.replace("/", "_") for name in (*AGAIN, *LOST)}
    for name, copy in copies.items():
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
        # Tables over runs, and other runs that read this one, notice it, too.
        if name in ("summary.json", "config.yaml", "outcomes.npz", "results.jsonl"):
            assert any(name in line for line in runs.overview([run]).warnings), name
        if name in ("summary.json", "config.yaml"):
            with pytest.raises(UserError):
                compose_module.of_run(str(run), "sources")
        with contextlib.suppress(UserError):
            page.write_run(run)
        if (run / name).is_dir():
            (run / name).rmdir()
        (run / name).unlink(missing_ok=True)
        shutil.copy(copy, run / name)


def test_well_formed_edits_are_detected(run):
    arrays = dict(np.load(run / "outcomes.npz"))
    arrays["fgsm_pred"][:] = arrays["label"]
    np.savez(run / "outcomes.npz", **arrays)
    with pytest.raises(UserError, match=r"outcomes\.npz: was changed"):
        files.load_arrays(run / "outcomes.npz")
    summary = json.loads((run / "summary.json").read_text())
    summary["worst_case_accuracy"]["value"] = 1.0
    for seal in (summary["seal"], None):
        (run / "summary.json").write_text(json.dumps({**summary, "seal": seal}))
        with pytest.raises(UserError, match=r"summary\.json: was changed"):
            read_summary(run)


def test_a_run_without_its_summary_is_refused_but_an_empty_wandb_folder_is_not_a_run(run, tmp_path):
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        found(run)
    (tmp_path / "new/wandb/lost+found").mkdir(parents=True)  # a disk of its own
    assert found(tmp_path / "new") == {}


def test_damage_is_repaired_without_training_again(launch, run):
    before = {path: path.read_bytes() for path in (run / "outcomes.npz", run / "tables/entropy.csv")}
    results = results_of(run)
    for path in before:
        path.write_bytes(b"")
    left = [run / ".summary.json.0123456789ab.tmp", run / "checkpoints/.best.pt.0123456789ab.tmp"]
    for path in left:  # by a process that was killed while it wrote
        path.touch()
    done = launch(*WORDS, "name=r")
    assert done.returncode == 0, done.stderr
    assert "computing again: outcomes.npz, tables/entropy.csv" in done.stderr
    assert "training:" not in done.stderr and "fgsm: " in done.stderr
    assert before == {path: path.read_bytes() for path in before}
    assert results == results_of(run)
    assert not any(path.exists() for path in left)


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
    with pytest.raises(UserError, match="is a link to"):
        page.write_run(run)
    (tmp_path / "linked").symlink_to(run.parent)  # a user's own
    assert read_summary(tmp_path / "linked/r")["status"] == "finished"


# ------------------------------------------------------------------------------------- what a run reads


@pytest.mark.slow
def test_a_model_that_was_trained_again_is_another_input(launch, run, tmp_path):
    words = ("trainer=none", "checkpoint=runs/r", *WORDS[1:3], "attack=none", "analysis=none", "logger=none")
    first = launch(*words, "name=j")
    assert first.returncode == 0, first.stderr
    done = launch(*WORDS, "name=r", "overwrite=true", "trainer.epochs=2", "attack=none", "analysis=none")
    assert done.returncode == 0, done.stderr
    again = launch(*words, "name=j")
    assert again.returncode == 1 and "clean" not in again.stdout
    assert again.stderr.startswith("error: run folder runs/j: checkpoint=runs/r has changed")
    swept = launch("-m", *words, "name=j", "seed=0")
    assert swept.returncode == 1 and "checkpoint=runs/r has changed" in swept.stderr
    truth = launch(*words, "name=j", "overwrite=true")
    assert truth.returncode == 0 and truth.stdout.split("worst")[0] != first.stdout.split("worst")[0]
    accuracies = [summary_of(tmp_path / "runs" / name)["clean_accuracy"] for name in "jr"]
    assert accuracies[0] == accuracies[1]
    shutil.rmtree(tmp_path / "runs/r")
    shown = launch(*words, "name=j")
    assert shown.returncode == 0 and "checkpoint=runs/r no longer exists" in shown.stderr
    assert shown.stdout == truth.stdout


def test_runs_files_and_code_are_identified_by_content(run, tmp_path, monkeypatch):
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
    inputs.check(run, read, inputs.now(read, config))
    changes = {
        "checkpoint=weights.pt": Path("weights.pt"), "attack.transfer.sources=runs/r": run / "checkpoints/best.pt",
        "analysis.compare.runs=runs/r": run / "outcomes.npz", "attack.grey.patch=patch.npy": Path("patch.npy"),
        "code ours/helper.py": Path("ours/helper.py"),
    }  # fmt: skip
    for key, path in changes.items():
        content, status = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + b"#")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(UserError, match=f"{key} has changed"):
            inputs.check(run, read, inputs.now(read, config))
        path.write_bytes(content)
    now = inputs.now({**read, "package torchvision": "0.1"}, config)
    with pytest.raises(UserError, match="package torchvision has changed"):
        inputs.check(run, {"package torchvision": "0.1"}, now)


# ----------------------------------------------------------------------------------------- overwrite=true


def test_overwrite_deletes_only_what_aerl_wrote(run, tmp_path):
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
    assert {path.name for path in run.iterdir()} == {".lock", "child", "notes.txt", "summary.json"}


def test_overwrite_counts_once(run):
    """What it started resumes; what it had only begun to delete is not a run."""
    own = read_summary(run)
    write_summary(run, {**own, "status": "discarded", "wish": "single"})
    (run / "checkpoints/best.pt").unlink()
    for words in ((), ("overwrite=true",)):
        assert found(run, *words)["status"] == "discarded"
    for status, resumes in (("running", True), ("stopped", True), ("failed", False), ("finished", False)):
        write_summary(run, {**own, "status": status, "wish": "single", "files": {}})
        assert (found(run, "overwrite=true")["status"] == status) is resumes, status
        write_summary(run, {**own, "status": status, "wish": None, "files": {}})
        assert found(run, "overwrite=true")["status"] == "discarded"
    config = config_of(*WORDS, "overwrite=true")
    write_summary(run, {**own, "wish": "a"})  # in a multirun, finished jobs are not repeated until all are finished
    assert run_folder.load_previous(run, config, "a")["status"] == "finished"
    assert run_folder.load_previous(run, config, "b")["status"] == "discarded"


@pytest.mark.slow
def test_a_multirun_overwrites_each_of_its_runs_once(launch, tmp_path):
    """Its second job fails. The same command repeats it alone; the next one starts all again."""
    words = ("-m", "seed=0,1", "trainer.epochs=1", "attack=none", "analysis=none", "logger=none", "overwrite=true")
    blocked = names.run_folder(tmp_path / "runs", config_of(*words[2:-1], "seed=1"), words[2:-1])
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    ids = []
    for expected in (1, 0, 0):
        done = launch(*words)
        assert done.returncode == expected, done.stderr
        assert expected == 0 or "1 done, 1 failed" in done.stdout
        ids.append(summary_of(blocked.with_name("seed0"))["run_id"])
        blocked.unlink() if expected else None
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


def test_a_lock_names_its_holder_and_ends_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.5)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on "), files.locked(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.locked(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.locked(tmp_path / "run"):
        (tmp_path / "run/file").touch()
    assert "the lock may not work (No locks available)" in caplog.text


def test_the_same_run_twice_at_once_is_one_run(tmp_path, data_dir):
    words = ("trainer.epochs=3", "attack=fgsm", "analysis=none", "logger=none", "name=twin")
    both = [begin(tmp_path, data_dir, *words) for _ in range(2)]
    both = [ended(process) for process in both]
    assert [done.returncode for done in both] == [0, 0], both
    assert sum("training:" in done.stderr for done in both) == 1
    results = read_results(tmp_path / "runs/twin/results.jsonl")
    assert len({result.run_id for result in results}) == 1
    assert len({(r.metric, r.split, r.attack, r.step) for r in results}) == len(results)


# ---------------------------------------------------------------------------------------------- analyses


BROKEN = """
from pathlib import Path
def broken(context):
    context.log.log({"half": context.batch_size}, n=1, split="test", attack="broken")
    if context.batch_size > 8: raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    if not Path("mended").exists(): raise ZeroDivisionError("of mine")
    context.log.log({"whole": 1}, n=1, split="test", attack="broken")
"""


def test_an_analysis_that_fails_is_repeated_alone(launch, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    words = (*WORDS, "analysis=[entropy]", "+analysis.broken={_target_: broken.broken}", "name=r",
             "+analysis.last={_target_: aerl.analyses.outcomes.norms}", "evaluation.batch_size=32")  # fmt: skip
    first, folder = launch(*words, PYTHONPATH=str(tmp_path)), tmp_path / "runs/r"
    assert first.returncode == 0, first.stderr
    summary, entropy = summary_of(folder), (folder / "figures/entropy.png").stat()
    assert summary["status"] == "finished"
    statuses = {name: row["status"] for name, row in summary["analyses"].items()}
    assert statuses == {"entropy": "made", "broken": "failed", "last": "made"}
    assert "ZeroDivisionError: of mine" in first.stdout and "Traceback" not in first.stdout + first.stderr
    assert "broken: out of memory" in first.stderr
    assert "ZeroDivisionError" in (folder / "run.log").read_text()
    (tmp_path / "mended").touch()
    again = launch(*words, PYTHONPATH=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert " samples in " not in again.stderr  # no attack
    assert (folder / "figures/entropy.png").stat() == entropy
    summary = summary_of(folder)
    assert summary["analyses"]["broken"]["status"] == "made" and summary["not_made"] == {}
    results = read_results(folder / "results.jsonl")
    assert [(r.metric, r.value) for r in results if r.attack == "broken"] == [("half", 8.0), ("whole", 1.0)]
    assert len({(r.metric, r.split, r.attack, r.step) for r in results}) == len(results)

"""results.jsonl, summary.json and the files under them survive crashes; the intervals of the numbers."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerl.errors import UserError
from aerl.evaluation.statistics import proportion, wilson
from aerl.runtime.files import atomic_write
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result, ResultLog, read_results, read_summary, write_summary
from tests.runs import wait_for

IDENTITY = {"run_id": "r", "seed": 0, "dataset": "digits", "model": "cnn", "trainer": "sl"}


@pytest.fixture
def log(tmp_path):
    return ResultLog(tmp_path, IDENTITY)


# ------------------------------------------------------------------------------------------- results.jsonl


def test_logged_results_are_read_back(log):
    written = log.log({"loss": 0.5, "accuracy": 1, "bad": math.nan}, n=10, split="train", step=0)
    written += log.log({"robust_accuracy": 0.25}, n=8, split="test", attack="pgd", norm="L2", eps=1, source="x")
    log.path.write_text(log.path.read_text().replace("{", '{"field_of_a_later_version": 1, '))
    read = read_results(log.path)
    assert read[:2] + read[3:] == written[:2] + written[3:]
    assert math.isnan(read[2].value)
    assert read[0] == Result("loss", 0.5, 10, "train", **IDENTITY, step=0)
    assert (read[3].attack, read[3].norm, read[3].eps, read[3].source, read[3].step) == ("pgd", "L2", 1.0, "x", None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_null_in_the_file(log, value):
    log.log({"loss": value}, n=1, split="train", step=0)
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail)["value"] is None


def test_a_torn_last_line_is_ignored(log):
    log.log({"a": 1, "é": 2}, n=1, split="train", step=0)
    content = log.path.read_bytes()
    for cut in range(content.index(b"\n") + 2, len(content) - 1):  # also in the middle of the é
        log.path.write_bytes(content[:cut])
        assert [result.metric for result in read_results(log.path)] == ["a"]
    log.path.write_bytes(content[:-1])
    assert [result.metric for result in read_results(log.path)] == ["a", "é"]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"metric": "loss"}', "\0\0\0"])
def test_any_other_broken_line_is_an_error(log, line):
    log.log({"a": 1}, n=1, split="train", step=0)
    with log.path.open("a") as file:
        file.write(line + "\n")
    log.log({"b": 1}, n=1, split="train", step=0)
    with pytest.raises(UserError, match=r"results\.jsonl: line 2"):
        read_results(log.path)


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    straight, resumed = ResultLog(tmp_path / "a", IDENTITY), ResultLog(tmp_path / "b", IDENTITY)

    def epochs(log, first, last):
        for epoch in range(first, last):
            log.log({"loss": 1 / (epoch + 1), "accuracy": epoch / 10}, n=4, split="train", step=epoch)

    resumed.restore(None)  # before anything was logged
    epochs(straight, 0, 8)
    epochs(resumed, 0, 4)
    seal = resumed.seal()
    epochs(resumed, 4, 6)
    with resumed.path.open("ab") as file:
        file.write(b'{"metric": "torn')
    resumed = ResultLog(tmp_path / "b", IDENTITY)
    resumed.restore(seal)
    epochs(resumed, 4, 8)
    assert resumed.path.read_bytes() == straight.path.read_bytes()
    resumed.restore(None)
    assert read_results(resumed.path) == []


@pytest.mark.parametrize("damage", ["edited", "shortened", "gone", "a folder"])
def test_sealed_results_must_be_unchanged(log, damage):
    log.log({"accuracy": 0.25}, n=4, split="val", step=1)
    seal = log.seal()
    log.log({"accuracy": 0.5}, n=4, split="val", step=2)
    content = log.path.read_bytes()
    log.path.unlink()
    if damage == "edited":
        log.path.write_bytes(content.replace(b"0.25", b"0.95"))
    elif damage == "shortened":
        log.path.write_bytes(content[: seal["bytes"] - 3])
    elif damage == "a folder":
        log.path.mkdir()
    with pytest.raises(UserError, match=r"results\.jsonl"):
        log.restore(seal)


LOGGING = f"""
import sys
from pathlib import Path
from aerl.tracking.results import ResultLog
log = ResultLog(Path(sys.argv[1]), {IDENTITY})
for epoch in range(10**6):
    log.log({{"loss": 0.5, "accuracy": 0.9}}, n=1, split="train", step=epoch)
"""


def test_sigkill_leaves_a_readable_record(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LOGGING, str(tmp_path)])
    path = tmp_path / "results.jsonl"
    wait_for(lambda: path.exists() and path.stat().st_size > 20_000, process, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    results = read_results(path)
    assert [result.step for result in results[::2]] == list(range((len(results) + 1) // 2))


# --------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", [b"new", "new", lambda file: file.write(b"new")])
def test_atomic_write_replaces_and_removes_stale_temporary_files(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    stale, young, other = (tmp_path / name for name in (".file.1.tmp", ".file.2.tmp", ".other.1.tmp"))
    for temporary in (stale, young, other):
        temporary.touch()
    for temporary in (stale, other):
        os.utime(temporary, (0, 0))
    atomic_write(path, content)
    assert path.read_text() == "new"
    assert set(tmp_path.iterdir()) == {path, young, other}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_writer_that_fails_changes_nothing(tmp_path, error):
    def writer(file):
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)):
        atomic_write(path, writer)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


FULL_DISK = f"""
import resource, sys
from pathlib import Path
from aerl.tracking.results import ResultLog, atomic_write
from aerl.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
folder = Path(sys.argv[1])
log = ResultLog(folder, {IDENTITY})
for attempt in (
    lambda: atomic_write(folder / "file", b"x" * 10**6),
    lambda: [log.log({{"loss": 0.5}}, n=1, split="train", step=step) for step in range(10**3)],
):
    try:
        attempt()
    except UserError as error:
        print(error)
print({{"torch", "numpy", "wandb", "hydra", "rich"}} & set(sys.modules))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_incomplete(tmp_path):
    """The process also imports no heavy library."""
    (tmp_path / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    files = [tmp_path / "file", tmp_path / "results.jsonl"]
    assert done.stdout.splitlines() == [*(f"cannot write {path}: File too large" for path in files), "set()"]
    assert sorted(tmp_path.iterdir()) == files and files[0].read_text() == "old"
    results = read_results(files[1])
    assert [result.step for result in results] == list(range(len(results))) and len(results) > 100


def test_a_summary_holds_what_json_can_hold(tmp_path):
    assert read_summary(tmp_path) is None
    value = {
        "nan": math.nan, "numpy": np.float32(0.5), "array": np.arange(2), "path": Path("a/b"),
        "n": np.int64(3), "deep": [{"inf": math.inf}], 1: True, "none": None,
    }  # fmt: skip
    write_summary(tmp_path, value)
    assert read_summary(tmp_path) == {
        "nan": None, "numpy": 0.5, "array": [0, 1], "path": "a/b", "n": 3,
        "deep": [{"inf": None}], "1": True, "none": None,
    }  # fmt: skip
    for text in ('{"status": ', "[]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot read .*summary\.json"):
            read_summary(tmp_path)


# ----------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # scipy.stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
        (0, 10, 0.0, 0.27753279986288926),
        (1, 10, 0.017876213095072896, 0.4041500267952385),
        (10, 10, 0.7224672001371109, 1.0),
        (353, 360, 0.9604137617991286, 0.9905498835245159),
        (5000, 10000, 0.49020206181540477, 0.5097979381845952),
    ],
)
def test_wilson_against_scipy(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-12)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_an_interval_around_the_value(counts):
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and low < high
    assert (low == 0) == (successes == 0) and (high == 1) == (successes == n)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    wide = wilson(successes, n, 0.99)
    assert wide[0] <= low and high <= wide[1]


def test_wilson_of_no_samples_and_of_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    assert math.isnan(proportion(0, 0)["value"]) and proportion(1, 2)["value"] == 0.5
    for successes, n, confidence in ((-1, 2, 0.95), (3, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)):
        with pytest.raises(ValueError):
            wilson(successes, n, confidence)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.5, "0.5"), (1.0, "1"), (0.0, "0"), (0.2, "0.2"), (1 / 3, "85/255")],
)
def test_eps_text(eps, text):
    assert eps_text(eps) == text

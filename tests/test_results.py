"""results.jsonl, summary.json and the numbers in them: whole after a crash, honest about what is unknown."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerl.evaluation.statistics import proportion, wilson
from aerl.tracking.results import (
    Result,
    ResultLog,
    atomic_write,
    read_results,
    read_summary,
    write_summary,
)
from aerl.types import UserError, eps_text

IDENTITY = {"run_id": "r", "seed": 0, "dataset": "digits", "model": "cnn", "trainer": "sl"}


def python(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------- the record


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    log = ResultLog(tmp_path, IDENTITY)
    written = log.log({"loss": 0.5, "accuracy": 1}, n=10, split="train", step=0)
    written += log.log({"robust_accuracy": 0.25}, n=8, split="test", attack="pgd", norm="L2", eps=1, source="x")
    assert read_results(log.path) == written
    assert written[0] == Result("loss", 0.5, 10, "train", **IDENTITY, step=0)
    last = written[-1]
    assert (last.attack, last.norm, last.eps, last.source, last.step) == ("pgd", "L2", 1.0, "x", None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path, value: float) -> None:
    log = ResultLog(tmp_path, IDENTITY)
    log.log({"loss": value}, n=1, split="train", step=0)
    strict = json.loads(log.path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert strict["value"] is None
    assert math.isnan(read_results(log.path)[0].value)


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    log = ResultLog(tmp_path, IDENTITY)
    log.log({"a": 1, "é": 2}, n=1, split="train", step=0)
    whole = log.path.read_bytes()
    for cut in range(whole.index(b"\n") + 2, len(whole) - 1):  # also in the middle of the é
        log.path.write_bytes(whole[:cut])
        assert [result.metric for result in read_results(log.path)] == ["a"]
    log.path.write_bytes(whole[:-1])  # whole but for its end
    assert [result.metric for result in read_results(log.path)] == ["a", "é"]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"metric": "loss"}', "\0\0\0"])
def test_any_other_broken_line_is_named(tmp_path: Path, line: str) -> None:
    log = ResultLog(tmp_path, IDENTITY)
    log.log({"a": 1}, n=1, split="train", step=0)
    with log.path.open("a") as file:
        file.write(line + "\n")
    log.log({"b": 1}, n=1, split="train", step=0)
    with pytest.raises(UserError, match=r"results\.jsonl: line 2 is not a result"):
        read_results(log.path)


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    log = ResultLog(tmp_path, IDENTITY)
    log.log({"a": 1}, n=1, split="train", step=0)
    log.path.write_text(log.path.read_text().replace("{", '{"colour": "blue", '))
    assert read_results(log.path)[0].metric == "a"


def test_a_resumed_log_is_the_straight_one(tmp_path: Path) -> None:
    straight, resumed = (
        ResultLog(_folder(tmp_path, "a"), IDENTITY),
        ResultLog(_folder(tmp_path, "b"), IDENTITY),
    )

    def epochs(log: ResultLog, first: int, last: int) -> None:
        for epoch in range(first, last):
            log.log({"loss": 1 / (epoch + 1)}, n=4, split="train", step=epoch)
            log.log({"accuracy": epoch / 10}, n=4, split="val", step=epoch)

    resumed.restore(None)  # before anything was logged
    epochs(straight, 0, 8)
    epochs(resumed, 0, 4)
    seal = resumed.seal()  # with the last checkpoint
    epochs(resumed, 4, 6)
    with resumed.path.open("ab") as file:
        file.write(b'{"metric": "torn')
    resumed = ResultLog(resumed.path.parent, IDENTITY)
    resumed.restore(seal)
    epochs(resumed, 4, 8)
    assert resumed.path.read_bytes() == straight.path.read_bytes()
    resumed.restore(None)
    assert read_results(resumed.path) == []


@pytest.mark.parametrize("damage", ["edited", "shortened", "gone", "a folder"])
def test_what_was_sealed_must_be_there_as_it_was(tmp_path: Path, damage: str) -> None:
    log = ResultLog(tmp_path, IDENTITY)
    log.log({"accuracy": 0.25}, n=4, split="val", step=1)
    seal = log.seal()
    log.log({"accuracy": 0.5}, n=4, split="val", step=2)  # what comes after it may be anything
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


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


LOGGING = f"""
import sys
from pathlib import Path
from aerl.tracking.results import ResultLog
log = ResultLog(Path(sys.argv[1]), {IDENTITY})
for epoch in range(10**6):
    log.log({{"loss": 0.5, "accuracy": 0.9}}, n=1, split="train", step=epoch)
"""


def test_sigkill_in_the_middle_leaves_a_readable_record(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", LOGGING, str(tmp_path)])
    path = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    results = read_results(path)
    assert len(results) > 50
    assert [result.step for result in results[::2]] == list(range((len(results) + 1) // 2))


# ------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("content", [b"new", "new", lambda file: file.write(b"new")])
def test_atomic_write_replaces(tmp_path: Path, content: object) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    atomic_write(path, content)  # type: ignore[arg-type]
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def writer(file: object) -> None:
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, writer)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_cleared_away_later(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".file.1.tmp", ".file.2.tmp", ".other.1.tmp"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    atomic_write(tmp_path / "file", b"")
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


FULL_DISK = f"""
import resource, sys
from pathlib import Path
from aerl.tracking.results import ResultLog, atomic_write, write_json
from aerl.types import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
folder = Path(sys.argv[1])
log = ResultLog(folder, {IDENTITY})
attempts = [
    lambda: atomic_write(folder / "file", b"x" * 10**6),
    lambda: write_json(folder / "file", list(range(10**5))),
    lambda: [log.log({{"loss": 0.5}}, n=1, split="train", step=step) for step in range(10**3)],
]
for attempt in attempts:
    try:
        attempt()
    except UserError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    done = python(FULL_DISK, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert line.startswith(f"cannot write {tmp_path}/")
        assert line.endswith("File too large; raise the limit on file sizes and repeat the command")
    assert names(tmp_path) == ["file", "results.jsonl"]
    assert (tmp_path / "file").read_text() == "old"
    kept = read_results(tmp_path / "results.jsonl")
    assert [result.step for result in kept] == list(range(len(kept)))
    assert len(kept) > 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    log = ResultLog.__new__(ResultLog)  # opening it would read /dev/full, which never ends
    log.path, log.tracker, log._identity = tmp_path / "results.jsonl", None, IDENTITY
    with pytest.raises(UserError, match=r"No space left on device; free some space and repeat the command$"):
        log.log({"loss": 1}, n=1, split="train", step=0)


def test_summary_holds_what_json_can_hold(tmp_path: Path) -> None:
    value = {
        "nan": math.nan, "numpy": np.float32(0.5), "array": np.arange(2), "path": Path("a/b"),
        "n": np.int64(3), "deep": [{"inf": math.inf}], 1: True, "none": None,
    }  # fmt: skip
    write_summary(tmp_path, value)  # type: ignore[arg-type]
    assert read_summary(tmp_path) == {
        "nan": None, "numpy": 0.5, "array": [0, 1], "path": "a/b", "n": 3,
        "deep": [{"inf": None}], "1": True, "none": None,
    }  # fmt: skip


def test_no_summary_is_none_and_a_broken_one_is_told(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    for text in ('{"status": ', "[]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot read .*summary\.json"):
            read_summary(tmp_path)


def test_importing_it_is_light() -> None:
    heavy = {"torch", "numpy", "wandb", "hydra", "rich"}
    assert python(f"import sys, aerl.tracking.results; print({heavy} & set(sys.modules))").stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # scipy.stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
        (0, 10, 0.0, 0.27753279986288926),
        (1, 10, 0.017876213095072896, 0.4041500267952385),
        (10, 10, 0.7224672001371109, 1.0),
        (36, 360, 0.07310954842368564, 0.13533689708726918),
        (353, 360, 0.9604137617991286, 0.9905498835245159),
        (5000, 10000, 0.49020206181540477, 0.5097979381845952),
    ],
)
def test_wilson_against_scipy(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-12)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_an_interval_around_the_value(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == n)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    wide = wilson(successes, n, 0.99)
    assert wide[0] <= low and high <= wide[1]


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    unknown = proportion(0, 0)
    assert math.isnan(unknown["value"]) and unknown["n"] == 0
    assert proportion(1, 2)["value"] == 0.5


@pytest.mark.parametrize(("successes", "n", "confidence"), [(-1, 2, 0.95), (3, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses_nonsense(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError):
        wilson(successes, n, confidence)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.5, "0.5"), (1.0, "1"), (0.0, "0"), (0.2, "0.2"), (1 / 3, "85/255")],
)
def test_eps_is_written_as_people_write_it(eps: float, text: str) -> None:
    assert eps_text(eps) == text

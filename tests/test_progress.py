"""The progress of long work: a live bar on a terminal, few log lines elsewhere."""

import re
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from aerl.runtime.progress import progress
from tests.runs import on_a_terminal


@pytest.fixture
def lines(caplog):
    caplog.set_level("INFO", "aerl")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def clock(monkeypatch):
    """The seconds that tqdm sees."""
    now, init = [100.0], tqdm.__init__

    def timed(self, *arguments, **options):
        init(self, *arguments, **options)
        self._time = lambda: now[0]
        self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(tqdm, "__init__", timed)
    return now


def test_log_lines_are_few_and_the_last_is_complete(clock, lines, capsys):
    with progress("train", 100_000, "images") as bar:
        for epoch in range(100):  # of 0.3 s each: 30 s in all
            for _ in range(10):
                clock[0] += 0.03
                bar.update(100, epoch=f"{epoch + 1}/100", loss=1 / (epoch + 1), acc=epoch / 100)
    assert 3 <= len(lines()) <= 4
    assert re.fullmatch(r"train: 33 %  3,333 images/s  epoch 34/100  loss 0.0294  acc 33.0 %", lines()[0])
    assert lines()[-1] == "train: 100,000 images in 30.0 s  3,333 images/s  epoch 100/100  loss 0.01  acc 99.0 %"
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_shows_what_is_done_but_does_not_time_it(clock, lines):
    with progress("train", 1000, "images", start=900) as bar:
        clock[0] += 10.0
        bar.update(100)
    assert lines() == ["train: 100 %  10 images/s", "train: 1,000 images in 10.0 s  10 images/s"]


def test_work_without_news_is_reported(lines, monkeypatch):
    """Such as one long batch of a black-box attack."""
    monkeypatch.setattr("aerl.runtime.progress._SILENCE", 0.3)
    with progress("square", 250, "samples") as bar:
        bar.update(10)
        time.sleep(0.8)
    assert len(lines()) >= 2 and re.match(r"square: 4 %  .*\d s so far$", lines()[0])


def test_interrupted_work_reports_how_far_it_came(lines):
    with pytest.raises(KeyboardInterrupt), progress("pgd", 360, "samples") as bar:
        bar.update(40)
        raise KeyboardInterrupt
    assert lines()[0].startswith("pgd: stopped at 40 of 360 samples in 0.0 s")


def test_a_tensor_is_read_only_when_it_is_shown():
    class OnTheGpu:
        reads = 0

        def __float__(self) -> float:
            self.reads += 1
            return 0.5

    loss = OnTheGpu()
    with progress("train", 1000) as bar:
        for _ in range(1000):
            bar.update(1, loss=loss)
    assert loss.reads <= 2


LIVE = """
import logging, sys, time
from aerl.runtime.progress import progress
logging.basicConfig(format="[%(levelname)s] %(message)s", stream=sys.stderr, level=logging.INFO)
with progress("train", 4000, "images") as bar:
    for epoch in range(4):
        for _ in range(10):
            time.sleep(0.03)
            bar.update(100, epoch=f"{epoch + 1}/4", loss=0.08, acc=0.971)
        if epoch == 1:
            logging.getLogger("aerl").warning("something is odd")
"""


def test_a_terminal_has_one_live_bar_that_becomes_one_line():
    screen = on_a_terminal(LIVE)
    assert re.search(r"train: \d+ % \|█.*images/s.*epoch 3/4.*acc 97\.1 %", screen)
    shown = [line.strip() for line in re.split(r"\r?\n|\r", screen) if line.strip()]
    assert re.fullmatch(r"\[INFO\] train: 4,000 images in \d\.\d s  [\d,]+ images/s  epoch 4/4  .*97\.1 %", shown[-1])
    assert "[WARNING] something is odd" in shown  # on a line of its own, above the bar


@pytest.mark.parametrize("dumb", [True, False])
def test_elsewhere_there_is_no_bar(dumb):
    if dumb:
        screen = on_a_terminal(LIVE, TERM="dumb")
    else:
        screen = subprocess.run([sys.executable, "-c", LIVE], capture_output=True, text=True, timeout=60).stderr
    assert screen.replace("\r", "").splitlines()[0] == "[WARNING] something is odd"
    assert "█" not in screen and "train: 4,000 images in" in screen

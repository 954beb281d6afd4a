"""Timing that survives a noisy machine: the candidates take turns, and only ratios of medians are told."""

import atexit
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch


def time_in_turns(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each candidate, `rounds` times A B C, A B C, ... after one uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of one candidate's time over another's."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def in_its_own_process(make: Callable[..., Callable[[], object]], *args: object) -> Callable[[], None]:
    """`make(*args)` lives in a process of its own; calling the result runs it there once.

    For a candidate that must not profit from what another one does to the whole process.
    """
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs, make, args))
    process.start()
    atexit.register(ours.send, False)

    def call() -> None:
        ours.send(True)
        ours.recv()

    return call


def _serve(
    connection: Connection, make: Callable[..., Callable[[], object]], args: tuple[object, ...]
) -> None:
    call = make(*args)
    while connection.recv():
        call()
        connection.send(None)

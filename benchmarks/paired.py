"""Timing that survives a noisy machine: the candidates take turns, and only ratios of medians are reported."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch


@dataclass(frozen=True)
class Timed:
    """What a candidate returns that times itself, because its call does more than what is timed."""

    seconds: float
    result: Any = None


def synchronize() -> None:
    """Wait for the GPU, where it is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], times: int = 1) -> Timed:
    """Seconds of one of `times` calls, and what the last of them returned."""
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        result = call()
    synchronize()
    return Timed((time.perf_counter() - began) / times, result)


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, `rounds` times A B C, A B C, ..., with `warm_up` after an uncounted one."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warm_up, rounds):
        for name, call in candidates.items():
            found = timed(call)
            if turn >= 0:
                own = found.result.seconds if isinstance(found.result, Timed) else found.seconds
                seconds[name].append(own)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of one candidate's time over another's."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


@contextmanager
def in_its_own_process(make: Callable[..., Callable[..., Any]], *args: object) -> Iterator[Callable[..., Any]]:
    """Call `make(*args)` in a separate process; yields a function that calls its result there.

    So that one candidate's settings of the process cannot affect another one. Arguments and results are pickled, with
    modules and tensors on the CPU.
    """
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs, make, args))
    process.start()
    theirs.close()

    def call(*words: object) -> Any:
        ours.send(words)
        return ours.recv()

    try:
        yield call
    finally:
        ours.close()
        process.join()


def _serve(connection: Connection, make: Callable[..., Callable[..., Any]], args: tuple[object, ...]) -> None:
    call = make(*args)
    while True:
        try:
            words = connection.recv()
        except EOFError:  # nobody asks any more
            return
        connection.send(call(*words))

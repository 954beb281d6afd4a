"""Timing that survives a noisy machine: the candidates take turns, and only ratios of medians are told."""

import statistics
import time
from collections.abc import Callable, Mapping

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

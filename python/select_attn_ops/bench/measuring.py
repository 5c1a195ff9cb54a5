"""Timing that survives a machine whose speed drifts: interleaved rounds, rotated data, medians."""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import runtime

Call = Callable[[int], object]
"""A call on one of the sets of inputs that are rotated, whose number it gets."""

# Long enough for OpenMP threads that spin after their work to fall asleep.
_SETTLE_SECONDS = 0.01
# What takes longer than this is far from any contest.
_LONG_SECONDS = 0.1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Contender:
    """What takes part in a measurement."""

    call: Call
    simd_target: str | None = None
    """What the library's kernels, and its reader, are compiled for; None is the best."""
    repeats: int = 1
    """How often `call` does what is measured."""

    def seconds(self, clock: Clock, turn: int) -> float:
        """Time what is measured, once."""
        runtime.set_simd_target(self.simd_target)
        return clock.seconds(functools.partial(self.call, turn)) / self.repeats


def by_turn(calls: Sequence[Callable[[], object]]) -> Call:
    """One call out of those for each set; there may be more turns than sets."""
    return lambda turn: calls[turn % len(calls)]()


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """What the rounds of a case may take, if they are enough by then."""
    least_rounds: int
    most_rounds: int
    caches: float
    """Size of the inputs that are rotated, as a multiple of the last cache."""
    small: bool = False
    """Whether small stand-ins will do: to see that it works, not how fast."""

    def times(self, factor: int) -> Effort:
        """With so many times the rounds."""
        return replace(
            self,
            seconds=factor * self.seconds,
            least_rounds=factor * self.least_rounds,
            most_rounds=factor * self.most_rounds,
        )


THOROUGH = Effort(seconds=0.6, least_rounds=9, most_rounds=200, caches=4)
QUICK = Effort(seconds=0.03, least_rounds=3, most_rounds=20, caches=0.5, small=True)


class Clock:
    """Measures seconds on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def contender(
        self, calls: Sequence[Callable[[], object]], simd_target: str | None = None
    ) -> Contender:
        """What takes part for these calls, one for each set of inputs."""
        return Contender(by_turn(calls), simd_target)

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one call: on the CPU by the clock, on a device between two events."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        module: Any = getattr(torch, self.device.type)
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def settle(self) -> None:
        """Wait until nothing of the calls before takes processors from the next ones."""
        if self.device.type == "cpu":
            time.sleep(_SETTLE_SECONDS)
        else:
            getattr(torch, self.device.type).synchronize(self.device)


class Turns:
    """Numbers of the sets of inputs, each in its turn, so that none is still in a cache."""

    def __init__(self, sets: int) -> None:
        self._numbers = itertools.cycle(range(sets))

    def next(self) -> int:
        return next(self._numbers)


def interleave(
    clock: Clock,
    contenders: Sequence[Contender],
    turns: Turns,
    effort: Effort,
    rare: Sequence[Contender] = (),
) -> tuple[list[list[float]], list[list[float]]]:
    """Measure contenders in rounds that have each of them once.

    Parameters
    ----------
    clock : Clock
        Measures.
    contenders : sequence of Contender
        Every round has all of them, in an order of its own.
    turns : Turns
        Hands out the sets of inputs.
    effort : Effort
        When to stop.
    rare : sequence of Contender
        Only some rounds have these too, behind the others; what takes long is in the first only.

    Returns
    -------
    seconds : list of list of float
        Per contender, the seconds of every round.
    rare_seconds : list of list of float
        The same for `rare`, of fewer rounds.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    rare_seconds: list[list[float]] = [[] for _ in rare]
    for contender in (*rare, *contenders):
        contender.seconds(clock, turns.next())
    spent = 0.0
    shuffle = random.Random(0).shuffle
    order = list(range(len(contenders)))
    rare_every = max(effort.least_rounds // 3, 1)
    for number in range(effort.most_rounds):
        if number >= effort.least_rounds and spent > effort.seconds:
            break
        shuffle(order)
        for which in order:
            seconds[which].append(contenders[which].seconds(clock, turns.next()))
            spent += seconds[which][-1] * contenders[which].repeats
        if rare and number % rare_every == 0 and number < effort.least_rounds:
            for contender, taken in zip(rare, rare_seconds, strict=True):
                if taken and taken[0] * contender.repeats > _LONG_SECONDS:
                    continue
                taken.append(contender.seconds(clock, turns.next()))
            clock.settle()
            contenders[0].seconds(clock, turns.next())  # wakes the library's threads again
    return seconds, rare_seconds


def last_cache_bytes(device: torch.device | None = None) -> int:
    """Size of the last cache, the processor's by default; 32 MiB where the system does not tell."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)\s*", path.read_text())
        if match is not None:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]])
    return max(sizes) or 32 << 20


def total_memory_bytes() -> int:
    """Size of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

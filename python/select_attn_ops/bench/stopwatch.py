"""What no caller can see from outside of a call: where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .._library import LIB


@dataclass(frozen=True)
class Laps:
    """Nanoseconds of one call; those of threads that ran side by side are added up."""

    python: int
    """From the Python function's call to its return."""
    # In the order of the phases in kernels/cpu/stopwatch.h.
    call: int
    """Inside the C++ function."""
    kernel: int
    """Inside the backend's kernel."""
    scoring: int
    """Of a selection: the scores of all blocks."""
    selection: int
    """Of a selection: the best of them."""

    @staticmethod
    def of(call: Callable[[], object]) -> Laps:
        """Make a call, with the library's stopwatch running."""
        LIB.set_stopwatch(True)
        try:
            start = time.perf_counter_ns()
            call()
            python = time.perf_counter_ns() - start
        finally:
            LIB.set_stopwatch(False)
        return Laps(python, *(LIB.stopwatch_time(phase) for phase in range(4)))


def without_arithmetic(call: Callable[[], object]) -> Callable[[], None]:
    """Make of a call of a selection or attention on the CPU one that only reads what that reads.

    It goes through the same memory in the same order, and what it returns means nothing.
    """

    def read() -> None:
        LIB.set_reads_only(True)
        try:
            call()
        finally:
            LIB.set_reads_only(False)

    return read

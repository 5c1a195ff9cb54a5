"""Where the time of a call goes: what stands between the operators and the read ceiling."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .cases import PREFILL, SELECT, Shape, Spec, build
from .runner import Runner
from .stopwatch import Laps

_K = 1 << 10

# Far more than the last cache holds; and half a mebibyte, which the second-level cache of a
# processor holds and the first-level one does not.
_SHAPES = {
    SELECT: (Shape(SELECT, (64 * _K,) * 32), Shape(SELECT, (16 * _K,))),
    PREFILL: (Shape(PREFILL, (16 * _K,) * 4), Shape(PREFILL, (256,), rows=1)),
}


def profile(runner: Runner) -> Iterator[str]:
    """Per operator, a line: its rates on one thread, and where the time goes.

    Parameters
    ----------
    runner : Runner
        Says how long to measure. The operators run on one thread: the laps of several, side by
        side, do not add up to the time of a call.

    Yields
    ------
    str
        A line for people.
    """
    for operator, (large, small) in _SHAPES.items():
        from_memory, laps = _measure(runner, large, runner.rotated_bytes, 50)
        from_cache, _ = _measure(runner, small, 0, 2000)
        line = (
            f"{operator} (bf16, 1 thread): {from_memory:.2f} GB/s from memory ({large}), "
            f"{from_cache:.2f} from the second-level cache ({small})"
        )
        if operator == SELECT:
            scoring = statistics.median(each.scoring / each.kernel for each in laps)
            selection = statistics.median(each.selection / each.kernel for each in laps)
            line += (
                f", both while scoring, which takes {scoring:.3f} of the time; selecting "
                f"{selection:.3f}, the rest {1 - scoring - selection:.3f}"
            )
        yield line


def _measure(
    runner: Runner, shape: Shape, rotated_bytes: int, repeats: int
) -> tuple[float, list[Laps]]:
    """GB/s while a shape's bytes are read, and the laps of all calls."""
    case = build(Spec(shape), runner.device, rotated_bytes)
    with runner.setting(threads=1):
        case.check()
        laps = [
            Laps.of(case.calls[i % len(case.calls)])
            for i in range(5 if runner.effort.small else repeats)
        ]
    reading = statistics.median(each.scoring or each.kernel for each in laps)
    return case.bytes_per_call / reading, laps

"""Where the time of a call goes: what stands between the operators and the read ceiling."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from .cases import ATTEND, PREFILL, SELECT, Case, Shape, Spec
from .runner import Runner
from .stopwatch import Laps, without_arithmetic

_CALLS = 60

# A quarter of a mebibyte, which the second-level cache of a processor holds and the first-level one
# does not.
_IN_CACHE = {
    SELECT: Shape(SELECT, (8 << 10,), rows=64),
    PREFILL: Shape(PREFILL, (128,), rows=1),
    ATTEND: Shape(ATTEND, (512,), num_heads=4, num_kv_heads=1, rows=1, k=4),
}


def profile(runner: Runner, specs: Sequence[Spec]) -> Iterator[str]:
    """Say per case which part of a call's time goes where, then how fast the arithmetic alone is.

    Of a selection and of attention, also which share of the kernel's time a kernel takes that only
    reads.

    Parameters
    ----------
    runner : Runner
        Measures.
    specs : sequence of Spec
        The cases, of `SELECT`, `PREFILL` and `ATTEND`.

    Yields
    ------
    str
        A line for people.
    """
    for spec in specs:
        yield _shares(runner, spec)
    kinds = [(spec.shape.operator, spec.dtype, spec.simd_target) for spec in specs]
    for operator, dtype, simd_target in dict.fromkeys(kinds):
        spec = Spec(_IN_CACHE[operator], dtype, 1, simd_target, warm=True)
        with runner.setting(spec.threads, spec.simd_target):
            case = runner.build(spec)
            case.check()
            rate = case.bytes_per_call / statistics.median(map(_reading, _laps(runner, case)))
        target = simd_target or runner.simd_target
        at_rate = f"{rate:.1f} GB/s from the second-level cache"
        yield f"{operator} ({dtype}, 1 thread, {target}): {at_rate}"


def _laps(runner: Runner, case: Case) -> list[Laps]:
    count = 5 if runner.effort.small else _CALLS
    for call in case.calls:
        call()
    return [Laps.of(case.calls[i % len(case.calls)]) for i in range(count)]


def _reading(laps: Laps) -> int:
    return laps.scoring or laps.kernel


def _time_without_arithmetic(case: Case, count: int) -> float:
    """Of what `_reading` takes, the share that is left when the kernel only reads.

    Of a selection the scoring alone, since the best of scores that mean nothing are found in
    another time.
    """
    ratios = []
    for i in range(count):
        call = case.calls[2 * i % len(case.calls)]
        other = case.calls[(2 * i + 1) % len(case.calls)]
        ratios.append(_reading(Laps.of(without_arithmetic(other))) / _reading(Laps.of(call)))
    return statistics.median(ratios)


def _shares(runner: Runner, spec: Spec) -> str:
    case = runner.build(spec)
    with runner.setting(spec.threads, spec.simd_target):
        share = runner.measure(case, beside_alternatives=False).share.median
        laps = _laps(runner, case)
        reads = spec.shape.operator in (SELECT, ATTEND)
        without = _time_without_arithmetic(case, len(laps)) if reads else None
    parts = parts_of_a_call(laps, spec.threads or runner.threads)
    text = ", ".join(f"{name} {part:.3f}" for name, part in parts.items())
    part = "scoring" if spec.shape.operator == SELECT else "the kernel"
    bare = "" if without is None else f" ({part} without arithmetic: {without:.3f} of its time)"
    return f"{spec.name}: {share:.3f} of the ceiling{bare}; of the threads' time: {text}"


def parts_of_a_call(laps: Sequence[Laps], threads: int) -> dict[str, float]:
    """Shares of the time that all threads have during a call, medians over the calls.

    A thread that waits for another counts as "the rest".
    """

    def share(part: Callable[[Laps], float]) -> float:
        return statistics.median(part(each) / each.python for each in laps)

    parts = {
        "Python": share(lambda each: each.python - each.call),
        "C++ around the kernel": share(lambda each: each.call - each.kernel),
    }
    if not any(each.scoring for each in laps):
        return {**parts, "the kernel": share(lambda each: each.kernel)}
    return {
        **parts,
        "scoring": share(lambda each: each.scoring / threads),
        "selecting": share(lambda each: each.selection / threads),
        "the rest": share(lambda each: each.kernel - (each.scoring + each.selection) / threads),
    }

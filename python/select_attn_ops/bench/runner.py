"""Measures a case: the operator, the best ways to read its memory, the alternatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .. import runtime
from . import alternatives
from .cases import Case, Spec, build
from .ceiling import Ceiling
from .measuring import Call, Clock, Contender, Effort, Spread, Turns, interleave, last_cache_bytes

# A share of the ceiling beyond this is no speed, but a ceiling that is too low.
CREDIBLE_SHARE = 1.02


@dataclass(frozen=True)
class Result:
    """What a case measured. Rates are in bytes per second."""

    spec: Spec
    threads: int
    simd_target: str
    seconds: Spread
    rate: float
    ceiling_rate: float
    ceiling_way: str
    share: Spread
    """Time of the best read of the operator's memory over the operator's, round by round."""
    alternatives: dict[str, float]
    """Seconds of each."""
    skipped: dict[str, str]
    """Alternatives that could not be measured, and why."""
    sets: int
    bytes_per_call: int
    rounds: int

    @property
    def credible(self) -> bool:
        return self.share.median <= CREDIBLE_SHARE

    @property
    def best_alternative(self) -> str | None:
        return min(self.alternatives, key=self.alternatives.__getitem__, default=None)


@dataclass
class Runner:
    """Measures cases on one device, one after another."""

    device: torch.device
    effort: Effort
    all_threads: int
    simd_target: str
    clock: Clock = field(init=False)
    ceiling: Ceiling = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.ceiling = Ceiling(self.clock)

    def run(self, spec: Spec) -> Result:
        """Build, check and measure a case."""
        case = build(spec, self.device, self.rotated_bytes)
        return self.measure(spec, case)

    @property
    def rotated_bytes(self) -> int:
        """Bytes of inputs that do not stay in the last cache from one turn to the next."""
        return int(self.effort.caches * last_cache_bytes())

    def measure(self, spec: Spec, case: Case) -> Result:
        """Check and measure a case whose data is there."""
        threads = spec.threads or self.all_threads
        target = spec.simd_target or self.simd_target
        before = torch.get_num_threads()
        runtime.set_num_threads(threads)
        torch.set_num_threads(threads)
        try:
            runtime.set_simd_target(target)
            case.check()
            self.clock.settle()
            return self._measure(spec, case, threads, target)
        finally:
            torch.set_num_threads(before)
            runtime.set_num_threads(self.all_threads)
            runtime.set_simd_target(self.simd_target)

    def _measure(self, spec: Spec, case: Case, threads: int, target: str) -> Result:
        best = self.ceiling.best(case.touched)
        operator = Contender(_by_turn(case.calls), target)
        others, skipped = self._alternatives(spec, case)
        seconds, others_seconds = interleave(
            self.clock,
            [operator, *(contender for _, contender in best)],
            Turns(len(case.calls)),
            self.effort,
            list(others.values()),
        )
        # What the operator moves may differ a little from what is read for the ceiling.
        scale = case.bytes_per_call / case.touched_bytes
        shares = [
            Spread.of([scale * read / own for own, read in zip(seconds[0], reads, strict=True)])
            for reads in seconds[1:]
        ]
        which = min(range(len(shares)), key=lambda i: shares[i].median)
        own = Spread.of(seconds[0])
        return Result(
            spec=spec,
            threads=threads,
            simd_target=target,
            seconds=own,
            rate=case.bytes_per_call / own.median,
            ceiling_rate=case.touched_bytes / Spread.of(seconds[1 + which]).median,
            ceiling_way=str(best[which][0]),
            share=shares[which],
            alternatives={
                name: Spread.of(taken).median
                for name, taken in zip(others, others_seconds, strict=True)
            },
            skipped=skipped,
            sets=len(case.calls),
            bytes_per_call=case.bytes_per_call,
            rounds=len(seconds[0]),
        )

    def _alternatives(self, spec: Spec, case: Case) -> tuple[dict[str, Contender], dict[str, str]]:
        others: dict[str, Contender] = {}
        skipped: dict[str, str] = {}
        for name, prepare in alternatives.alternatives(spec.compiled).items():
            try:
                calls = [prepare(problem) for problem in case.problems]
            except alternatives.UnavailableError as error:
                skipped[name] = str(error)
                continue
            others[name] = Contender(_by_turn(calls))
        self.clock.settle()
        return others, skipped


def _by_turn(calls: Sequence[Callable[[], object]]) -> Call:
    return lambda turn: calls[turn]()

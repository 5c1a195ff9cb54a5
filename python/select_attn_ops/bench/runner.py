"""Measures a case: the operator, the best ways to read its memory, the alternatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import runtime
from .alternatives import UnavailableError
from .cases import Case, Spec, build
from .ceiling import Ceiling
from .measuring import Call, Clock, Contender, Effort, Spread, Turns, interleave, last_cache_bytes

# A share of the ceiling beyond this is no speed, but a ceiling that is too low.
CREDIBLE_SHARE = 1.02
# How often a ceiling that is too low is looked for anew.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Result:
    """What a case measured. Times are in seconds, rates in bytes per second."""

    label: str
    operator: str
    shape: str
    dtype: str
    threads: int
    simd_target: str
    seconds: Spread
    rate: float
    bytes_per_call: int
    ceiling_rate: float
    ceiling_way: str
    share: Spread
    """Time of the best read of the operator's memory over the operator's, round by round."""
    alternatives: dict[str, float]
    """Times of each."""
    skipped: dict[str, str]
    """Alternatives that could not be measured, and why."""
    sets: int
    rounds: int

    @property
    def credible(self) -> bool:
        """Whether the ceiling is one."""
        return self.share.median <= CREDIBLE_SHARE

    @property
    def best_alternative(self) -> str | None:
        return min(self.alternatives, key=self.alternatives.__getitem__, default=None)


class Runner:
    """Measures cases on one device, one after another.

    Parameters
    ----------
    device : torch.device
        Where the data is.
    effort : Effort
        How long to measure.
    """

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device = device
        self.effort = effort
        self.threads = runtime.get_num_threads()
        """What "all" means."""
        self.simd_target = runtime.simd_target()
        self.clock = Clock(device)
        self.ceiling = Ceiling(self.clock)
        self._built: tuple[object, Case] | None = None

    @property
    def rotated_bytes(self) -> int:
        """Bytes of inputs that do not stay in the last cache from one turn to the next."""
        return int(self.effort.caches * last_cache_bytes())

    def build(self, spec: Spec) -> Case:
        """Make the data of a case, or take that of the case before if it is the same."""
        key = (spec.label, spec.shape, spec.dtype)
        if self._built is None or self._built[0] != key:
            self._built = None  # frees its memory first
            self._built = (key, build(spec, self.device, self.rotated_bytes))
        return self._built[1]

    @contextlib.contextmanager
    def setting(self, threads: int | None = None, simd_target: str | None = None) -> Iterator[None]:
        """Use so many threads, in torch too, and a SIMD target; None is what was at first."""
        threads = self.threads if threads is None else threads
        before = torch.get_num_threads()
        try:
            runtime.set_num_threads(threads)
            torch.set_num_threads(threads)
            runtime.set_simd_target(simd_target or self.simd_target)
            yield
        finally:
            torch.set_num_threads(before)
            runtime.set_num_threads(self.threads)
            runtime.set_simd_target(self.simd_target)

    def read_rates(self) -> dict[int, float]:
        """Bytes per second of the best read of two long tensors, by one thread and by all."""
        count = max(self.rotated_bytes, 1 << 20) // 8
        # Ones, because pages of zeros may all be the same page.
        tensors = [torch.ones(count, device=self.device) for _ in range(2)]
        rates = {}
        for threads in sorted({1, self.threads}):
            with self.setting(threads):
                best = [contender for _, contender in self.ceiling.best([tensors])]
                seconds, _ = interleave(self.clock, best, Turns(1), self.effort)
            rates[threads] = 8 * count / min(Spread.of(taken).median for taken in seconds)
        return rates

    def run(self, spec: Spec) -> Result:
        """Build, check and measure a case."""
        case = self.build(spec)
        with self.setting(spec.threads, spec.simd_target):
            return self.measure(case, spec.compiled)

    def measure(self, case: Case, compiled: bool = False) -> Result:
        """Check and measure a case in the present setting."""
        case.check()
        others, skipped = self._alternatives(case, compiled)
        for _ in range(_ATTEMPTS):
            result = self._measure(case, others, skipped)
            if result.credible:
                break
            # Other work on the machine may have hidden the best way to read.
            self.ceiling.forget()
        return result

    def _measure(
        self, case: Case, others: Mapping[str, Contender], skipped: dict[str, str]
    ) -> Result:
        threads, target = runtime.get_num_threads(), runtime.simd_target()
        best = self.ceiling.best(case.touched)
        seconds, others_seconds = interleave(
            self.clock,
            [Contender(by_turn(case.calls), target), *(contender for _, contender in best)],
            Turns(len(case.calls)),
            self.effort,
            list(others.values()),
        )
        runtime.set_simd_target(target)
        # What the operator moves may differ a little from what is read for the ceiling.
        scale = case.bytes_per_call / case.touched_bytes
        shares = [
            Spread.of([scale * read / own for own, read in zip(seconds[0], reads, strict=True)])
            for reads in seconds[1:]
        ]
        which = min(range(len(shares)), key=lambda i: shares[i].median)
        own = Spread.of(seconds[0])
        return Result(
            label=case.label,
            operator=case.operator,
            shape=case.shape,
            dtype=case.dtype,
            threads=threads,
            simd_target=target,
            seconds=own,
            rate=case.bytes_per_call / own.median,
            bytes_per_call=case.bytes_per_call,
            ceiling_rate=case.touched_bytes / Spread.of(seconds[1 + which]).median,
            ceiling_way=str(best[which][0]),
            share=shares[which],
            alternatives={
                name: Spread.of(taken).median
                for name, taken in zip(others, others_seconds, strict=True)
            },
            skipped=skipped,
            sets=len(case.calls),
            rounds=len(seconds[0]),
        )

    def _alternatives(
        self, case: Case, compiled: bool
    ) -> tuple[dict[str, Contender], dict[str, str]]:
        others: dict[str, Contender] = {}
        skipped: dict[str, str] = {}
        for name, prepare in case.alternatives(compiled).items():
            try:
                others[name] = Contender(by_turn(prepare()))
            except UnavailableError as error:
                skipped[name] = str(error)
        self.clock.settle()
        return others, skipped


def by_turn(calls: Sequence[Callable[[], object]]) -> Call:
    """One call out of those for each set; there may be more turns than sets."""
    return lambda turn: calls[turn % len(calls)]()

"""Measures a case: the operator, the best ways to read its memory, the alternatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .. import runtime
from .alternatives import OtherWorkError, UnavailableError
from .cases import Case, Spec, build
from .ceiling import Ceiling
from .device_ceiling import empty_kernel, processors
from .graphs import CaptureError, GraphClock, clock_for
from .measuring import (
    Contender,
    Effort,
    Spread,
    Turns,
    interleave,
    last_cache_bytes,
)

# A share of the ceiling beyond this is no speed, but a ceiling that is too low.
CREDIBLE_SHARE = 1.02
# Nor is it one of this memory if a plain read of so many bytes is so much slower than one of long
# tensors at the start of the run: something else had the processors.
_LONG_READ = 32 << 20
_BUSY_SHARE = 0.5
# How often a ceiling that is too low is looked for, with twice the care each time.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Result:
    """What a case measured. Times are in seconds, rates in bytes per second."""

    device_type: str
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
    disturbed: bool
    """Whether the machine had other things to do."""
    sets: int
    rounds: int

    @property
    def credible(self) -> bool:
        """Whether the ceiling is one."""
        return self.share.median <= CREDIBLE_SHARE and not self.disturbed

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
        self.clock = clock_for(device)
        self.ceiling = Ceiling(self.clock)
        self._built: tuple[object, Case] | None = None
        self._read_rates: dict[int, float] = {}

    @property
    def rotated_bytes(self) -> int:
        """Bytes of inputs that do not stay in the last cache from one turn to the next."""
        return int(self.effort.caches * last_cache_bytes(self.device))

    def build(self, spec: Spec) -> Case:
        """Make the data of a case, or take that of the case before if it is the same."""
        key = (spec.label, spec.shape, spec.dtype, spec.warm)
        if self._built is None or self._built[0] != key:
            self._built = None  # frees its memory first
            rotated_bytes = 0 if spec.warm else self.rotated_bytes
            self._built = (key, build(spec, self.device, rotated_bytes))
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
        if self.device.type != "cpu":  # no cache shall hold much of what is read again and again
            count *= 4
        # Ones, because pages of zeros may all be the same page.
        tensors = [torch.ones(count, device=self.device) for _ in range(2)]
        rates = {}
        for threads in sorted({1, self.threads}) if self.device.type == "cpu" else [1]:
            with self.setting(threads):
                best = [contender for _, contender in self.ceiling.best([tensors])]
                seconds, _ = interleave(self.clock, best, Turns(1), self.effort)
            rates[threads] = 8 * count / min(Spread.of(taken).median for taken in seconds)
        self._read_rates = rates
        return rates

    def empty_kernels(self) -> dict[int, float]:
        """Seconds of a kernel that does nothing, of one thread block and of one per processor.

        None on the CPU.
        """
        if self.device.type != "cuda":
            return {}
        blocks = [1, processors(self.device)]
        contenders = [empty_kernel(self.clock, count) for count in blocks]
        seconds, _ = interleave(self.clock, contenders, Turns(1), self.effort)
        return {
            count: Spread.of(taken).median for count, taken in zip(blocks, seconds, strict=True)
        }

    def run(self, spec: Spec) -> Result:
        """Build, check and measure a case."""
        case = self.build(spec)
        with self.setting(spec.threads, spec.simd_target):
            return self.measure(case, spec.compiled)

    def measure(
        self, case: Case, compiled: bool = False, beside_alternatives: bool = True
    ) -> Result:
        """Check and measure a case in the present setting."""
        case.check()
        others, skipped = self._alternatives(case, compiled) if beside_alternatives else ({}, {})
        for attempt in range(_ATTEMPTS):
            result = self._measure(case, others, skipped, care=2**attempt)
            if result.credible:
                break
            # Other work on the machine may have hidden the best way to read, or it may be chance.
            self.ceiling.forget()
        return result

    def _measure(
        self,
        case: Case,
        others: Mapping[str, Contender],
        skipped: dict[str, str],
        care: int,
    ) -> Result:
        threads, target = runtime.get_num_threads(), runtime.simd_target()
        best = self.ceiling.best(case.touched, care)
        seconds, others_seconds = interleave(
            self.clock,
            [self.clock.contender(case.calls, target), *(contender for _, contender in best)],
            Turns(len(case.calls)),
            self.effort.times(care),
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
        ceiling_rate = case.touched_bytes / Spread.of(seconds[1 + which]).median
        expected_rate = self._read_rates.get(threads, 0.0) if self.device.type == "cpu" else 0.0
        # Rows with gaps between them may be as slow as that by themselves.
        is_long = case.touched_bytes >= _LONG_READ and all(
            tensor.is_contiguous() for tensor in case.touched[0]
        )
        return Result(
            device_type=self.device.type,
            label=case.label,
            operator=case.operator,
            shape=case.shape,
            dtype=case.dtype,
            threads=threads,
            simd_target=target,
            seconds=own,
            rate=case.bytes_per_call / own.median,
            bytes_per_call=case.bytes_per_call,
            ceiling_rate=ceiling_rate,
            ceiling_way=str(best[which][0]),
            share=shares[which],
            alternatives={
                name: Spread.of(taken).median
                for name, taken in zip(others, others_seconds, strict=True)
            },
            skipped=skipped,
            disturbed=is_long and ceiling_rate < _BUSY_SHARE * expected_rate,
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
                calls = prepare()
            except OtherWorkError:
                continue
            except UnavailableError as error:
                skipped[name] = str(error)
                continue
            try:
                others[name] = self.clock.contender(calls)
            except CaptureError:
                assert isinstance(self.clock, GraphClock)
                others[f"{name}, in no graph"] = self.clock.launched(calls)
        self.clock.settle()
        return others, skipped

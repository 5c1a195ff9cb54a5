"""The read ceiling: how fast the very memory of an operator can be read, by the best of many ways.

A single way would not do: how many places are read at once, whether and how far ahead is
prefetched, how wide the vectors are and how the work is cut all cost or gain up to a half, and
which is best differs between machines, between one thread and many, and with gaps in the data.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import runtime
from .._library import LIB
from . import device_ceiling
from .measuring import Clock, Contender, Turns
from .spans import is_dense, span

_KIB, _MIB = 1 << 10, 1 << 20

# To find the best ways: each round's share of them goes on to the next round.
_ROUNDS = ((2, 24), (3, 8), (5, 3))
# What a calibration reads of larger data.
_CALIBRATION_BYTES = 64 * _MIB


@dataclass(frozen=True)
class Way:
    """One way to read; see ``kernels/cpu/read_memory.h``."""

    simd_target: str
    streams: int
    prefetch_bytes: int
    far_prefetch_bytes: int
    chunk_bytes: int
    side_by_side: bool
    with_gaps: bool
    """The gaps between the rows are read as well, though they do not count."""

    def __str__(self) -> str:
        parts = [self.simd_target, f"{self.streams} streams"]
        if self.side_by_side:
            parts.append("over the tensors")
        if self.prefetch_bytes:
            far = f" and {self.far_prefetch_bytes}" if self.far_prefetch_bytes else ""
            parts.append(f"prefetch {self.prefetch_bytes}{far} B")
        parts.append(f"{self.chunk_bytes // _KIB} KiB chunks" if self.chunk_bytes else "shares")
        if self.with_gaps:
            parts.append("gaps too")
        return ", ".join(parts)


def ways_to_read(tensors: Sequence[torch.Tensor]) -> list[Way]:
    """All ways that are worth a try with these tensors."""
    # Narrower vectors than those of the best two targets do not win, and a byte each is no way.
    targets = [target for target in runtime.simd_targets() if target != "SCALAR"][:2]
    targets = targets or ["SCALAR"]
    alike = len(tensors) > 1 and len({(t.shape, t.stride()) for t in tensors}) == 1
    # Into the first-level cache, and besides into the second; the latter as the kernels do, and
    # for rows with gaps of their own length.
    prefetches = ((0, 0), (256, 0), (1024, 0), (4 * _KIB, 12 * _KIB), (8 * _KIB, 24 * _KIB))
    chunks = (0, _MIB, 256 * _KIB, 64 * _KIB)
    ways = [
        Way(target, streams, *prefetch, chunk, side_by_side, with_gaps=False)
        for target, streams, prefetch, chunk, side_by_side in itertools.product(
            targets, (1, 2, 4, 8), prefetches, chunks, (False, True)
        )
        if (not side_by_side or (alike and streams % len(tensors) == 0))
        # Small chunks would be over before anything comes of a prefetch so far ahead.
        and (prefetch[1] == 0 or chunk in (0, _MIB))
    ]
    gappy = [tensor for tensor in tensors if not is_dense(tensor)]
    if gappy and all(span(tensor).numel() <= 4 * tensor.numel() for tensor in gappy):
        ways += [
            Way(target, streams, 0, 0, chunk, False, with_gaps=True)
            for target, streams, chunk in itertools.product(targets, (1, 2, 4), (0, _MIB))
        ]
    return ways


def reader(sets: Sequence[Sequence[torch.Tensor]], way: Way) -> Contender:
    """Read each of these sets of tensors in its turn."""
    arguments = []
    for tensors in sets:
        spans = [span(tensor) if way.with_gaps else tensor for tensor in tensors]
        arguments.append([*spans, None, None][:3])
    prefetch = (way.prefetch_bytes, way.far_prefetch_bytes)
    options = (way.streams, *prefetch, way.chunk_bytes, way.side_by_side)
    read_memory = LIB.read_memory
    return Contender(lambda turn: read_memory(*arguments[turn], *options), way.simd_target)


def _first(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The first part of a tensor."""
    return tensor[: max(int(share * len(tensor)), 1)]


class Ceiling:
    """Finds the best ways to read, and remembers which are worth a try the next time."""

    def __init__(self, clock: Clock) -> None:
        self._ways: Callable[[Sequence[torch.Tensor]], Sequence[Any]]
        self._reader: Callable[[Sequence[Sequence[torch.Tensor]], Any], Contender]
        if clock.device.type == "cpu":
            self._ways, self._reader = ways_to_read, reader
            self._calibration_bytes = _CALIBRATION_BYTES
        elif clock.device.type == "cuda":
            self._ways = lambda tensors: device_ceiling.device_ways()
            self._reader = functools.partial(device_ceiling.device_reader, clock)
            self._calibration_bytes = 1 << 62
        else:
            raise NotImplementedError(f"no read ceiling for {clock.device} in this version")
        self._clock = clock
        self._known: dict[object, Sequence[Any]] = {}

    def forget(self) -> None:
        """Try every way again the next time."""
        self._known.clear()

    def best(
        self, sets: Sequence[Sequence[torch.Tensor]], care: int = 1
    ) -> list[tuple[Any, Contender]]:
        """Find the best ways to read these sets of tensors with the threads now set.

        Three of them, or `care` times as many: which is best of all is for a longer measurement.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in sets[0])
        share = min(self._calibration_bytes / size, 1)
        parts = [[_first(tensor, share) for tensor in tensors] for tensors in sets]
        # Where nothing is between the rows, how they lie makes no difference.
        kinds = tuple(is_dense(tensor) or (tensor.shape[1:], tensor.stride()) for tensor in sets[0])
        key = (
            *(runtime.get_num_threads(), kinds, len(sets) > 1),
            min(size, self._calibration_bytes).bit_length(),
        )
        ways = self._known.get(key) or self._ways(sets[0])
        turns = Turns(len(sets))
        for repeats, keep in _ROUNDS:
            ways = self._best_of(ways, parts, turns, repeats, care * keep)
            self._known.setdefault(key, ways)
        return [(way, self._reader(sets, way)) for way in ways]

    def _best_of(
        self,
        ways: Sequence[Any],
        sets: Sequence[Sequence[torch.Tensor]],
        turns: Turns,
        repeats: int,
        keep: int,
    ) -> Sequence[Any]:
        if len(ways) <= keep:
            return list(ways)
        contenders = [self._reader(sets, way) for way in ways]
        taken: list[list[float]] = [[] for _ in ways]
        for _ in range(repeats):
            for contender, seconds in zip(contenders, taken, strict=True):
                seconds.append(contender.seconds(self._clock, turns.next()))
        order = sorted(range(len(ways)), key=lambda i: statistics.median(taken[i]))
        return [ways[i] for i in order[:keep]]

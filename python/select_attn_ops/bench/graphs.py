"""Timing on a CUDA device: graphs, of which the time of a node is what counts.

A call by itself would be measured with what the host needs to launch it, which a decode step that
is captured in a graph does not pay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .measuring import Clock, Contender

_cuda: Any = torch.cuda  # parts of it have no types

_LEAST_NODES = 40
"""Enough for the time between the events and the graph to make no difference."""


class CaptureError(RuntimeError):
    """Calls cannot be captured in a graph."""


class GraphClock(Clock):
    """Measures graphs that have a node, or a few, for the calls on all sets of inputs in turn.

    With all sets in it, a graph reads what it has not read for as long as the others take: no
    cache that is smaller holds it. Where there is one set, all nodes read the same.
    """

    def contender(
        self, calls: Sequence[Callable[[], object]], simd_target: str | None = None
    ) -> Contender:
        """Capture the calls; raises `CaptureError`."""
        nodes = _nodes(calls)
        replay = self.capture(nodes)
        return Contender(lambda turn: replay(), repeats=len(nodes))

    def launched(self, calls: Sequence[Callable[[], object]]) -> Contender:
        """What takes part for calls that cannot be captured: as many, launched one by one."""
        nodes = _nodes(calls)
        return Contender(lambda turn: [node() for node in nodes], repeats=len(nodes))

    def seconds(self, call: Callable[[], object]) -> float:
        """Time a call between two events, right behind another one, so that nothing waits."""
        call()
        begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """Capture calls in a graph; returns what replays it on the current stream."""
        stream = _cuda.Stream(self.device)
        stream.wait_stream(_cuda.current_stream(self.device))
        # Not torch.cuda.graph, which collects garbage every time.
        graph = _cuda.CUDAGraph()
        with _cuda.stream(stream):
            calls[0]()  # what is loaded or compiled on first use cannot be captured
            stream.synchronize()
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            except Exception as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise CaptureError(_first_line(error)) from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                raise CaptureError(_first_line(error)) from error
        _cuda.current_stream(self.device).wait_stream(stream)
        replay: Callable[[], object] = graph.replay
        return replay


def _nodes(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    return list(calls) * -(-_LEAST_NODES // len(calls))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def clock_for(device: torch.device) -> Clock:
    """The clock that measures on a device."""
    return GraphClock(device) if device.type == "cuda" else Clock(device)

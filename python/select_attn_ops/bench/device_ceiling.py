"""Ways to read a CUDA device's memory: plain reductions, by the library and by torch.

Where an operator's tensors have gaps, as many bytes of the same memory are read without gaps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .._library import LIB
from .measuring import Clock, Contender
from .spans import is_dense, span, touched_bytes

_THREADS_PER_PROCESSOR = 2048


@dataclass(frozen=True)
class DeviceWay:
    """A variant of the library's reduction; see ``kernels/core/read_device_memory.h``."""

    threads: int
    blocks_per_processor: int
    loads: int
    vector_bytes: int
    streaming: bool

    def __str__(self) -> str:
        text = (
            f"{self.blocks_per_processor} x {self.threads} threads, {self.loads} loads of "
            f"{self.vector_bytes} B"
        )
        return text + ", streaming" * self.streaming


@dataclass(frozen=True)
class TorchWay:
    """A reduction by torch of each tensor."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


Way = DeviceWay | TorchWay


def device_ways() -> list[Way]:
    """All ways that are worth a try."""
    ways: list[Way] = [
        DeviceWay(*way)
        for way in itertools.product((256, 512), (1, 2, 4, 8), (2, 4, 8), (8, 16), (False, True))
        if way[0] * way[1] <= _THREADS_PER_PROCESSOR
    ]
    return [*ways, TorchWay("amax"), TorchWay("sum")]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """As many bytes as a tensor's cache lines have, from its first on."""
    flat = span(tensor)
    if not is_dense(tensor):
        flat = flat[: touched_bytes(tensor) // tensor.element_size()]
    return flat.view(torch.uint8)


def device_reader(clock: Clock, sets: Sequence[Sequence[torch.Tensor]], way: Way) -> Contender:
    """Read each of these sets of tensors in its turn."""
    parts = [[bytes_of(tensor) for tensor in tensors] for tensors in sets]
    if isinstance(way, TorchWay):
        return clock.contender([_torch_read(way, tensors) for tensors in parts])
    device = sets[0][0].device
    blocks = way.blocks_per_processor * processors(device)
    bits = torch.zeros(blocks, dtype=torch.int32, device=device)
    options = (bits, way.threads, way.loads, way.vector_bytes, way.streaming)
    return clock.contender(
        [
            functools.partial(LIB.read_device_memory, *[*tensors, None, None][:3], *options)
            for tensors in parts
        ]
    )


def _torch_read(way: TorchWay, tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    reduce = getattr(torch, way.name)
    words = [flat[: len(flat) // 4 * 4].view(torch.float32) for flat in tensors]
    outs = [torch.empty((), device=flat.device) for flat in words]

    def read() -> None:
        for flat, out in zip(words, outs, strict=True):
            reduce(flat, 0, out=out)

    return read


def empty_kernel(clock: Clock, blocks: int) -> Contender:
    """A kernel of so many thread blocks that does nothing."""
    bits = torch.zeros(blocks, dtype=torch.int32, device=clock.device)
    call = functools.partial(LIB.read_device_memory, None, None, None, bits, 32, 0, 1, False)
    return clock.contender([call])


def processors(device: torch.device) -> int:
    """How many a device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

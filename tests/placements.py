"""Any strides and offset: tensors placed in flat storage, as torch tensors or NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common.compare import same_values
from hypothesis import strategies as st

# Elements of storage before and behind what an operator sees; a whole number of cache lines.
_MARGIN = 64


@dataclass(frozen=True)
class Placement:
    """How a dense shape is spread over storage.

    Parameters
    ----------
    order : tuple of int
        All dimensions but the last, from the outermost to the innermost in memory.
    slack : tuple of int or None
        Per dimension, elements that its stride leaves behind what the inner ones span; None: as
        many as they span.
    negative : tuple of bool
        Per dimension, whether its stride is negative.
    unit_stride : int or None
        Stride of dimensions of size 1.
    offset : int
        Elements between an address of 64 bytes' alignment and the storage that is used.
    numpy : bool
        Make a NumPy array; torch knows no negative strides.
    """

    order: tuple[int, ...]
    slack: tuple[int | None, ...]
    negative: tuple[bool, ...]
    unit_stride: int | None
    offset: int
    numpy: bool


@dataclass
class Placed:
    """A tensor in storage with guards around and between its elements."""

    storage: torch.Tensor
    index: torch.Tensor  # of every element in the storage
    view: Any

    def __repr__(self) -> str:
        strides = self.view.strides if isinstance(self.view, np.ndarray) else self.view.stride()
        kind = type(self.view).__name__
        return f"{kind}({list(self.view.shape)}, strides {list(strides)}, {self.storage.dtype})"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))  # or Hypothesis prints every element of the storage

    def dense(self) -> torch.Tensor:
        """Return a copy of the elements."""
        return self.storage[self.index]

    def put(self, elements: Any) -> None:
        """Write the elements through the view, wherever that lies."""
        if isinstance(self.view, torch.Tensor):
            self.view.copy_(torch.as_tensor(elements))
        else:
            self.storage[self.index] = torch.as_tensor(elements)


@contextmanager
def moved(operands: Iterable[Placed], device: torch.device) -> Iterator[None]:
    """Let the views lie on a device, where the storage is copied, and back after the block."""
    if device.type == "cpu":
        yield
        return
    kept = [(placed, placed.view, placed.storage.to(device)) for placed in operands]
    for placed, view, storage in kept:
        placed.view = storage.as_strided(view.shape, view.stride(), view.storage_offset())
    yield
    for placed, view, storage in kept:
        placed.view = view
        placed.storage.copy_(storage)


@st.composite
def placements(draw: st.DrawFn, rank: int, *, numpy: bool) -> Placement:
    """Draw a layout for tensors of ``rank`` dimensions."""
    if rank > 1 and draw(st.booleans()):
        order = tuple(draw(st.permutations(range(rank - 1))))
        # One dimension at most doubles the storage.
        double = draw(st.sampled_from((None, *range(rank - 1))))
        slack = tuple(
            None if dim == double else draw(st.sampled_from((0, 0, 1, 3, 8)))
            for dim in range(rank - 1)
        )
        negative = tuple(numpy and draw(st.booleans()) for _ in range(rank - 1))
        unit_stride = draw(st.sampled_from((None, 0, 1, 7_777_777, 2**40)))
    else:
        order, slack, negative = tuple(range(rank - 1)), (0,) * (rank - 1), (False,) * (rank - 1)
        unit_stride = None
    offset = draw(st.sampled_from((0, 0, 1, 2, 3, 5, 8)))
    return Placement(order, slack, negative, unit_stride, offset, numpy)


def place(
    data: torch.Tensor, placement: Placement, *, fill: float, shared: Sequence[int] = ()
) -> Placed:
    """Copy ``data`` into new storage.

    Parameters
    ----------
    data : torch.Tensor
        The elements.
    placement : Placement
        Where they go.
    fill : float
        What the guards and gaps hold.
    shared : sequence of int
        Dimensions of stride 0, along which the first element stands for all.
    """
    shape = tuple(data.shape)
    last = len(shape) - 1
    strides = [1] * len(shape)
    span = max(shape[last], 1)
    for dim in reversed(placement.order):
        if dim in shared:
            strides[dim] = 0
            continue
        slack = placement.slack[dim]
        strides[dim] = span + (span if slack is None else slack)
        span = strides[dim] * max(shape[dim], 1)
    start = _MARGIN + placement.offset
    storage = torch.full((start + span + _MARGIN,), fill, dtype=data.dtype)
    for dim, size in enumerate(shape):
        if dim < last and placement.negative[dim] and size > 1:
            start += strides[dim] * (size - 1)
            strides[dim] *= -1

    index = torch.full((1,) * len(shape), start)
    for dim, size in enumerate(shape):
        along = torch.arange(size) * strides[dim]
        index = index + along.view([-1 if i == dim else 1 for i in range(len(shape))])
    source = data
    for dim in shared:
        source = source.narrow(dim, 0, min(1, shape[dim])).expand(shape)
    storage[index] = source

    if placement.unit_stride is not None:
        for dim, size in enumerate(shape[:last]):
            if size == 1 and dim not in shared:
                strides[dim] = placement.unit_stride
    if placement.numpy:
        flat = storage.numpy()
        view = np.lib.stride_tricks.as_strided(
            flat[start:], shape, [stride * flat.itemsize for stride in strides]
        )
    else:
        view = storage.as_strided(shape, strides, start)
    return Placed(storage, index, view)


def assert_holds(name: str, placed: Placed, before: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that a call left ``expected`` in an output and wrote nothing else in its storage.

    Parameters
    ----------
    name : str
        What the message calls the output.
    placed : Placed
        The output, after the call.
    before : torch.Tensor
        Its storage from before the call.
    expected : torch.Tensor
        The elements it must hold.
    """
    whole = before.clone()
    whole[placed.index] = expected
    if same_values(placed.storage, whole).all():
        return
    after = placed.dense()
    wrong = ~same_values(after, expected)
    if not wrong.any():
        raise AssertionError(f"{name}: elements outside the view were written")
    at = tuple(int(i) for i in wrong.nonzero()[0])
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ, first at {at}: "
        f"expected {expected[at].item()}, got {after[at].item()}"
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype and shape hold the same bytes."""
    if a.numel() == 0:  # whose strides may be such that torch has no view of it
        return a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

"""Strided storage as engines use it, with guard zones around and between what an operator sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# No generator produces it, every dtype holds it, and neither zero nor NaN, it equals only itself.
GUARD_VALUE = 768
_GUARD_ELEMENTS = 64


@dataclass(frozen=True)
class Layout:
    """How a dense shape is spread over storage; all counts in elements of one dimension.

    Parameters
    ----------
    inner_first : bool
        Swap the two dimensions before the last in memory (heads outside tokens).
    row_factor, row_extra : int
        The last dimension occupies ``row_factor * size + row_extra`` elements.
    outer_factor, outer_rows : int
        The first dimension's stride is ``outer_factor`` times the dense one, plus ``outer_rows``
        rows.
    offset : int
        Elements between the aligned guard zone and the first element.
    unit_stride : int or None
        Stride given to dimensions of size 1 (which nothing may depend on).
    """

    inner_first: bool = False
    row_factor: int = 1
    row_extra: int = 0
    outer_factor: int = 1
    outer_rows: int = 0
    offset: int = 0
    unit_stride: int | None = None

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the strides of ``shape`` in this layout."""
        order = list(range(len(shape)))
        if self.inner_first and len(shape) >= 3:
            order[-2], order[-3] = order[-3], order[-2]
        strides = [1] * len(shape)
        row = max(shape[-1], 1) * self.row_factor + self.row_extra
        running = row
        for dim in reversed(order[:-1]):
            strides[dim] = running
            running *= max(shape[dim], 1)
        if len(shape) > 1:
            strides[order[0]] *= self.outer_factor
            strides[order[0]] += self.outer_rows * row
        if self.unit_stride is not None:
            strides[:-1] = [
                self.unit_stride if size == 1 else stride
                for size, stride in zip(shape[:-1], strides[:-1], strict=True)
            ]
        return tuple(strides)


LAYOUTS = {
    "contiguous": Layout(),
    # [blocks, 2, rows, heads, dim][:, 0]
    "interleaved": Layout(outer_factor=2),
    # [blocks, heads, rows, dim] seen as [blocks, rows, heads, dim]
    "heads_outside": Layout(inner_first=True),
    # [..., :dim] of rows that hold key and value
    "half_of_last": Layout(row_factor=2),
    # heads outside and key and value in one row
    "heads_outside_half": Layout(inner_first=True, row_factor=2),
    # a slice of a packed QKV, or of a wider table
    "wider": Layout(outer_rows=2, offset=3),
    # rows that start anywhere, so no two are 16-byte aligned alike
    "unaligned": Layout(row_extra=1, offset=1),
    # the same but for the first one
    "padded": Layout(row_extra=1),
    "odd_unit_strides": Layout(unit_stride=7_777_777),
}
CACHE_LAYOUTS = tuple(LAYOUTS)


def strided_full(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    *,
    fill: float = GUARD_VALUE,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return a view of ``shape`` in ``layout``, its storage with all guards full of ``fill``."""
    spec = LAYOUTS["contiguous" if layout == "dense" else layout]
    strides = spec.strides(shape)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    extent = 0 if 0 in shape else last + 1
    flat = torch.full(
        (2 * _GUARD_ELEMENTS + spec.offset + extent,), fill, dtype=dtype, device=device
    )
    return flat.as_strided(shape, strides, _GUARD_ELEMENTS + spec.offset)


def strided_copy(
    data: torch.Tensor,
    layout: str,
    *,
    fill: float = GUARD_VALUE,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return ``data`` laid out as ``layout`` on ``device``, with ``fill`` in guards and gaps.

    ``"dense"`` is ``"contiguous"`` without guards, which on the CPU is ``data`` itself.
    """
    if layout == "dense":
        return data.to(device)
    view = strided_full(tuple(data.shape), data.dtype, layout, fill=fill, device=device)
    view.copy_(data)
    return view


def whole_storage(view: torch.Tensor) -> torch.Tensor:
    """Return everything the storage of ``view`` holds, as one dimension."""
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())


def clone_with_storage(view: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``view`` with the same strides in a copy of its whole storage."""
    return whole_storage(view).clone().as_strided(view.size(), view.stride(), view.storage_offset())

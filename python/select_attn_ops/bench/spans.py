"""Where tensors lie in memory."""

from __future__ import annotations

import torch


def span(tensor: torch.Tensor) -> torch.Tensor:
    """Everything from a tensor's first element to its last, gaps included, as one dimension."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no gaps, in whatever order its dimensions are."""
    return span(tensor).numel() == tensor.numel()


def touched_bytes(tensor: torch.Tensor, line: int = 64) -> int:
    """Bytes of the cache lines that a tensor with contiguous rows lies on."""
    item = tensor.element_size()
    if is_dense(tensor):
        return tensor.numel() * item
    order = sorted(
        (s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    )  # smallest stride first
    row = 1
    while order and order[0][0] == row:
        row *= order.pop(0)[1]
    starts = torch.tensor([tensor.data_ptr() % line])
    for stride, count in order:
        starts = (starts[None] + torch.arange(count)[:, None] * stride * item).flatten()
    first = starts // line
    last = (starts + row * item - 1) // line
    shared = (first[1:] == last[:-1]).sum()  # with the row before
    return int(((last - first + 1).sum() - shared) * line)

"""Attention over all tokens out of attention over parts of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from ._library import extents, is_torch, namespace_of, torch


def merge_attention_states(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    r"""Merge the results of attention over disjoint sets of tokens, for the same queries.

    What `paged_select_attention` returns with ``lse=`` for one part of a selection, and any other
    attention that returns the logarithm of its softmax's denominator for another, is merged into
    what attention over all of the tokens returns:

    .. math:: out = \sum_i e^{lse_i - lse}\ out_i, \qquad lse = \log \sum_i e^{lse_i}

    Parameters
    ----------
    outs : sequence of tensor
        At least one, all ``[..., D]``, of one type: torch tensors, NumPy arrays or others that
        implement the array API.
    lses : sequence of tensor
        As many, all ``[...]``, float32, natural logarithms. -inf where a part has no tokens: what
        `out` holds there does not matter.

    Returns
    -------
    out : tensor
        ``[..., D]``, new, of the type of the first of `outs`; 0 where no part has tokens.
    lse : tensor
        ``[...]``, new, float32; -inf where no part has tokens.

    Raises
    ------
    TypeError
        If one of them is not a tensor.
    ValueError
        If there are none, more of one than of the other, or their shapes differ.

    Notes
    -----
    Arithmetic is float32, the parts are added in the order in which they are given, element by
    element: the same parts in the same order give the same result, whatever the batch.

    Examples
    --------
    One token of value 1 and three of value 5, of equal weight:

    >>> import numpy as np
    >>> from select_attn_ops import merge_attention_states
    >>> out, lse = merge_attention_states(
    ...     [np.array([[1.0]], np.float32), np.array([[5.0]], np.float32)],
    ...     [np.log(np.array([1.0], np.float32)), np.log(np.array([3.0], np.float32))],
    ... )
    >>> out
    array([[4.]], dtype=float32)
    >>> np.exp(lse).round(3)
    array([4.], dtype=float32)
    """
    _check(outs, lses)
    xp = torch if is_torch(outs[0]) else namespace_of(outs[0])
    float32 = xp.float32
    largest = functools.reduce(xp.maximum, lses)
    # A finite number in place of -inf, for -inf less -inf is NaN.
    base = xp.where(largest == -math.inf, xp.zeros_like(largest), largest)
    total = xp.zeros_like(base)
    result = xp.zeros_like(outs[0], dtype=float32)
    for out, lse in zip(outs, lses, strict=True):
        weight = xp.exp(lse - base)
        total = total + weight
        weight = weight[..., None]
        part = xp.asarray(out, dtype=float32)
        result = result + weight * xp.where(weight == 0, xp.zeros_like(part), part)
    is_empty = total == 0
    total = xp.where(is_empty, xp.ones_like(total), total)
    result = xp.asarray(result / total[..., None], dtype=outs[0].dtype)
    return result, xp.where(is_empty, largest, base + xp.log(total))


def _check(outs: Sequence[Any], lses: Sequence[Any]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"expected as many lses as outs, at least one, got {len(lses)} and {len(outs)}"
        )
    shape = extents("outs[0]", outs[0])
    if not shape:
        raise ValueError("outs[0] must be [..., D], got []")
    for name, tensors, expected in (("outs", outs, shape), ("lses", lses, shape[:-1])):
        for i, tensor in enumerate(tensors):
            got = extents(f"{name}[{i}]", tensor)
            if got != expected:
                raise ValueError(f"{name}[{i}] must be {list(expected)}, got {list(got)}")

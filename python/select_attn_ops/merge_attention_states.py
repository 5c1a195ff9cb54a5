"""Attention over all tokens out of attention over parts of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

from ._library import dtype_name, extents, is_numpy, is_torch, namespace_of, torch


def merge_attention_states(outs: Iterable[Any], lses: Iterable[Any]) -> tuple[Any, Any]:
    r"""Merge the results of attention over disjoint sets of tokens, for the same queries.

    What `paged_select_attention` returns with ``lse=`` for one part of a selection, and any other
    attention that returns the logarithm of its softmax's denominator for another, is merged into
    what attention over all of the tokens returns:

    .. math:: out = \sum_i e^{lse_i - lse}\ out_i, \qquad lse = \log \sum_i e^{lse_i}

    Parameters
    ----------
    outs : iterable of tensor
        At least one, all ``[..., D]``, of one type (float16, bfloat16 or float32), kind (torch
        tensors, NumPy arrays or others that implement the array API) and device.
    lses : iterable of tensor
        As many of the same kind and device, all ``[...]`` (``[B, H]`` of a decode step), float32,
        *natural* logarithms: those of FlashInfer are to base 2, to be multiplied by ``log(2)``.
        -inf where a part has no tokens: what `out` holds there does not matter.

    Returns
    -------
    out : tensor
        ``[..., D]``, new, of the type of `outs`; 0 where no part has tokens.
    lse : tensor
        ``[...]``, new, float32; -inf where no part has tokens.

    Raises
    ------
    TypeError
        If one of them is not a tensor, or of another kind or dtype than above.
    ValueError
        If there are none, more of one than of the other, or their shapes or devices differ.

    Notes
    -----
    Arithmetic is float32, the parts are added in the order in which they are given, element by
    element: the same parts in the same order give the same result, whatever the batch.

    An `lse` of NaN or +inf, which stands for a logit of NaN or +inf, makes NaN of both results.
    Logits that are all -inf leave the same `lse` as no tokens, and so count as none: where all of
    every part are, `out` is 0, and not NaN as that of attention over the whole.

    Not differentiable: gradients do not flow, and inputs may require them.

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
    outs, lses = _listed("outs", outs), _listed("lses", lses)
    _check(outs, lses)
    if is_torch(outs[0]):
        xp = torch
        outs, lses = [out.detach() for out in outs], [lse.detach() for lse in lses]
    else:
        xp = namespace_of(outs[0])
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


def _listed(name: str, tensors: Any) -> list[Any]:
    # A stacked tensor would be taken apart without a word, an array of the array API perhaps not.
    if hasattr(tensors, "__dlpack__") or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(tensors).__name__}")
    return list(tensors)


def _check(outs: list[Any], lses: list[Any]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"expected as many lses as outs, at least one, got {len(lses)} and {len(outs)}"
        )
    parts = [("outs", i, out) for i, out in enumerate(outs)]
    parts += [("lses", i, lse) for i, lse in enumerate(lses)]
    first = outs[0]
    shapes = [extents(f"{name}[{i}]", tensor) for name, i, tensor in parts]
    for name, i, tensor in parts:
        if _kind(tensor) != _kind(first):
            raise TypeError(
                f"{name}[{i}] must be a {_kind(first)} like outs[0], got {type(tensor).__name__}"
            )
        if is_torch(tensor) and tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be a dense tensor, got layout {tensor.layout}")
    shape = shapes[0]
    if not shape:
        raise ValueError("outs[0] must be [..., D], got []")
    dtype = dtype_name(first.dtype)
    if dtype not in ("float16", "bfloat16", "float32"):
        raise TypeError(f"outs[0] must be float16, bfloat16 or float32, got {dtype}")
    for name, i, tensor in parts:
        expected, like = (dtype, " like outs[0]") if name == "outs" else ("float32", "")
        if dtype_name(tensor.dtype) != expected:
            got = dtype_name(tensor.dtype)
            raise TypeError(f"{name}[{i}] must be {expected}{like}, got {got}")
    device = getattr(first, "device", None)  # NumPy's has none before version 2
    for name, i, tensor in parts:
        if getattr(tensor, "device", None) != device:
            raise ValueError(f"{name}[{i}] must be on {device} like outs[0], got {tensor.device}")
    for (name, i, _), extents_of in zip(parts, shapes, strict=True):
        wanted = shape if name == "outs" else shape[:-1]
        if extents_of != wanted:
            raise ValueError(f"{name}[{i}] must be {list(wanted)}, got {list(extents_of)}")


def _kind(tensor: Any) -> str:
    if is_torch(tensor):
        return "torch tensor"
    return "NumPy array" if is_numpy(tensor) else type(tensor).__name__

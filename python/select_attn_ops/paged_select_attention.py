"""Attention of a decode step over the selected KV blocks only."""

from __future__ import annotations

from typing import Any

from . import _torch_ops
from ._library import (
    LIB,
    allocating_for,
    argument,
    extents,
    in_kind_of,
    is_on_cpu,
    mark_written,
    new_like,
    new_workspace,
    optional_argument,
    optional_number,
    stream_handle,
)


def paged_select_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    selected_indices: Any,
    *,
    scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    workspace: Any = None,
    stream: int | None = None,
) -> Any:
    r"""Attend to the selected KV blocks of a paged cache, one query token per request.

    For query head `h` of KV head `n`, with the valid tokens `t` of the blocks in
    ``selected_indices[b, n]``:

    .. math:: out = \sum_t \mathrm{softmax}_t(scale \cdot q \cdot key_t)\ value_t

    With every block selected this is dense attention. Tensors are torch tensors, NumPy arrays or
    any others that speak DLPack, all on one device, with any strides and offset as long as the
    last dimension is contiguous: the caches of engines are used as they are, without a copy.

    Parameters
    ----------
    query : tensor
        ``[B, H, D]``, float16, bfloat16 or float32: one token per request, `H` query heads of `D`
        channels.
    k_cache, v_cache : tensor
        ``[num_kv_blocks, block_size, N, D]``, dtype of `query`; `N` KV heads divide the `H` query
        heads; query head `h` belongs to KV head ``h // (H // N)``.
    block_tables : tensor
        ``[B, MKBPR]``, int32: physical KV block of each logical block of each request. Only
        entries of selected blocks are read.
    seq_lens : tensor
        ``[B]``, int32: tokens in the cache, the one at hand included. Request `b` has
        ``T = ceil(seq_lens[b] / block_size)`` KV blocks.
    selected_indices : tensor
        ``[B, N, k]``, int32: block numbers within each request, 0 to ``T - 1``, in any order, as
        `quest_block_select_paged` returns them. -1 anywhere is left out.
    scale : float, optional
        Of the dot products, finite in float32. Default: ``D ** -0.5``.
    out : tensor, optional
        ``[B, H, D]``, dtype of `query`, written in full: it need not be initialised. Default: a
        new tensor.
    lse : tensor, optional
        ``[B, H]``, float32, written in full: the natural logarithm of the sum of the exponentials
        of the scaled dot products, which `merge_attention_states` takes. Default: not written.
    workspace : tensor, optional
        ``[bytes]``, uint8: scratch for a device, `paged_select_attention_workspace_size` bytes,
        zero-filled before its first use, for one stream at a time. The CPU needs none. Default: a
        new one per call where one is needed.
    stream : int, optional
        Handle of the device's stream to run on. Default: the framework's current one.

    Returns
    -------
    tensor
        `out`, or a new ``[B, H, D]`` tensor of the kind and dtype of `query`.

    Raises
    ------
    TypeError
        If a dtype is not as listed, an argument is not a tensor, or `scale` is not a number.
    ValueError
        If a rank, shape, layout or device is not as listed; if `H` is not a multiple of `N`; if
        `scale` is not finite in float32; an output that overlaps itself or another argument; on the
        CPU also if a length is negative or beyond what the table holds, a selected number is below
        -1 or does not exist in its request, or a table entry that is read lies outside the pool.
        Devices cannot look: they clamp lengths and leave such blocks out.
    NotImplementedError
        If there is no backend for the device, a limit of it is exceeded, or, as on Ascend, it has
        no such operator.
    RuntimeError
        If the device itself fails. Only then may anything have been written.

    Notes
    -----
    *Edges.* A block listed twice counts twice. Nothing selected gives zeros, and an `lse` of -inf.
    What is not selected does not matter, NaN and infinities included, nor what lies behind the
    last token of a partial block. A NaN in a selected key makes NaN of its heads, one in a value
    of its channel.

    *Arithmetic* is float32, whatever the dtype, with a running maximum: large dot products do not
    overflow the softmax.

    *Limits.* None on the CPU: any `D`, `block_size`, ``k >= 1`` and group size, pools beyond 2**31
    elements, ``B == 0``. The result for a request depends neither on the number of threads nor on
    the batch.

    *Cost.* Keys and values of the selected tokens are read once for all query heads that share
    them. Not differentiable. Works under ``torch.compile``. The call returns when the work is done
    on the CPU, when it is queued on a device.

    Examples
    --------
    A request of 40 tokens has three blocks of 16. Keys of 0 make plain means of the values, which
    are 1, 2 and 3 in the blocks. Block 0 has 16 tokens, block 2 has 8:

    >>> import numpy as np
    >>> from select_attn_ops import paged_select_attention
    >>> keys = np.zeros((3, 16, 1, 2), np.float32)
    >>> values = np.ones((3, 16, 1, 2), np.float32) * np.reshape([1, 2, 3], (3, 1, 1, 1))
    >>> query, table = np.ones((1, 1, 2), np.float32), np.array([[0, 1, 2]], np.int32)
    >>> lse = np.empty((1, 1), np.float32)
    >>> paged_select_attention(
    ...     query, keys, values.astype(np.float32), table, np.array([40], np.int32),
    ...     np.array([[[2, 0, -1]]], np.int32), lse=lse,
    ... )
    array([[[1.6666666, 1.6666666]]], dtype=float32)
    >>> np.exp(lse).round()  # 24 tokens of weight 1
    array([[24.]], dtype=float32)
    """
    result = out
    if result is None:
        shape = extents("query", query)
        with allocating_for(query, stream):
            result = new_like(shape, query)
    tensors = (query, k_cache, v_cache, block_tables, seq_lens, selected_indices, result)
    arguments = (*tensors, optional_number("scale", scale), lse, workspace, stream)
    every_tensor = (*tensors, lse, workspace)
    written = (result,) if lse is None else (result, lse)
    if not _torch_ops.call_directly(LIB.paged_select_attention, arguments, every_tensor, written):
        run = _compiled if _torch_ops.takes_over(every_tensor) else _run
        run(*arguments)
    return out if out is not None else in_kind_of(query, result)


def paged_select_attention_workspace_size(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    selected_indices: Any,
    out: Any,
) -> int:
    """Bytes of workspace that `paged_select_attention` needs for arguments of these shapes.

    Parameters
    ----------
    query, k_cache, v_cache, block_tables, seq_lens, selected_indices, out
        As for `paged_select_attention`. Only shapes, dtypes and the device matter.

    Returns
    -------
    int
        Length of `workspace`. 0 on the CPU.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `paged_select_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from select_attn_ops import paged_select_attention_workspace_size
    >>> query, table = np.zeros((1, 2, 64), np.float16), np.zeros((1, 1), np.int32)
    >>> paged_select_attention_workspace_size(
    ...     query, *np.zeros((2, 1, 16, 1, 64), np.float16), table, np.array([16], np.int32),
    ...     np.zeros((1, 1, 1), np.int32), np.empty_like(query),
    ... )
    0
    """
    tensors = _arguments(
        query, k_cache, v_cache, block_tables, seq_lens, selected_indices, out, written=False
    )
    return int(LIB.paged_select_attention_workspace_size(*tensors))


def _arguments(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    selected_indices: Any,
    out: Any,
    *,
    written: bool,
) -> tuple[Any, ...]:
    return (
        argument("query", query),
        argument("k_cache", k_cache),
        argument("v_cache", v_cache),
        argument("block_tables", block_tables),
        argument("seq_lens", seq_lens),
        argument("selected_indices", selected_indices),
        argument("out", out, written=written),
    )


def _run(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    selected_indices: Any,
    out: Any,
    scale: float | None,
    lse: Any,
    workspace: Any,
    stream: int | None,
) -> None:
    tensors = _arguments(
        query, k_cache, v_cache, block_tables, seq_lens, selected_indices, out, written=True
    )
    if workspace is None and not is_on_cpu(query):
        with allocating_for(query, stream):
            size = int(LIB.paged_select_attention_workspace_size(*tensors))
            workspace = new_workspace(size, query)
    LIB.paged_select_attention(
        *tensors,
        scale,
        optional_argument("lse", lse, written=True),
        optional_argument("workspace", workspace, written=True),
        stream_handle(query, stream),
    )
    mark_written(out, lse)


_compiled = _torch_ops.register(
    "paged_select_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor seq_lens, Tensor selected_indices, Tensor(a!) out, float? scale, Tensor(b!)? lse, "
    "Tensor(c!)? workspace, int? stream) -> ()",
    _run,
)

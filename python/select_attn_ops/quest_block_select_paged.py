"""Quest block selection: which KV blocks of each request matter most to its query."""

from __future__ import annotations

from typing import Any

from . import _torch_ops
from ._library import (
    LIB,
    allocating_for,
    argument,
    extents,
    in_kind_of,
    integer,
    is_on_cpu,
    mark_written,
    new_int32,
    new_workspace,
    optional_argument,
    stream_handle,
)


def quest_block_select_paged(
    query: Any,
    maxblocks: Any,
    minblocks: Any,
    metadata_block_tables: Any,
    seq_lens: Any,
    k: int | None = None,
    *,
    tokens_since_metadata_update: int = -1,
    metadata_seq_lens: Any = None,
    block_size: int | None = None,
    out: Any = None,
    workspace: Any = None,
    stream: int | None = None,
) -> Any:
    r"""Select the `k` KV blocks of each request that matter most to its query, per KV head.

    Blocks are ranked by the Quest score, an upper bound on the dot product of the query with any
    key of the block:

    .. math:: score(j) = \sum_d \max(q_d \max_{jd},\ q_d \min_{jd})

    where :math:`q` is the float32 mean of the query heads that share the KV head. Tensors are
    torch tensors, NumPy arrays or any others that speak DLPack, all on one device, with any
    strides and offset as long as the last dimension is contiguous.

    Parameters
    ----------
    query : tensor
        ``[B, H, D]``, float16, bfloat16 or float32: one token per request, `H` query heads of `D`
        channels.
    maxblocks, minblocks : tensor
        ``[num_meta_blocks, R, N, D]``, dtype of `query`, as `quest_prefill_metadata` writes them;
        `N` KV heads divide the `H` query heads; query head `h` belongs to KV head
        ``h // (H // N)``.
    metadata_block_tables : tensor
        ``[B, MMBPR]``, int32: the metadata blocks of each request, in order. KV block `j` is
        described by row ``j % R`` of metadata block ``metadata_block_tables[b, j // R]``. Only
        entries of blocks that are scored are read.
    seq_lens : tensor
        ``[B]``, int32: tokens in the cache, the one at hand included. Request `b` has
        ``T = ceil(seq_lens[b] / block_size)`` KV blocks.
    k : int, optional
        Blocks to select, at least 1. Leave it out when `out` is given.
    tokens_since_metadata_update : int
        ``t >= 0``: tokens decoded since the metadata was last written; the window and the sink
        are then selected before any scored block (see Notes). Default: -1, nothing is forced.
    metadata_seq_lens : tensor, optional
        ``[B]``, int32: per request, ``seq_lens[b] - t`` in place of one `t` for all. Not both.
    block_size : int, optional
        Tokens per KV block, as the metadata was written. Default: `R`. Required when ``R == 1``.
        Nothing in the tensors tells a wrong one.
    out : tensor, optional
        ``[B, N, k]``, int32, written in full: it need not be initialised.
    workspace : tensor, optional
        ``[bytes]``, uint8: scratch for a device, `quest_block_select_paged_workspace_size` bytes,
        zero-filled before its first use, for one stream at a time. The CPU needs none. Default: a
        new one per call where one is needed.
    stream : int, optional
        Handle of the device's stream to run on. Default: the framework's current one.

    Returns
    -------
    tensor
        `out`, or a new ``[B, N, k]`` int32 tensor of the kind of `query`. Block numbers count from
        the start of the request, 0 to ``T - 1``; they are not indices into the KV cache
        (`selected_block_tables` turns them into such).

    Raises
    ------
    TypeError
        If a dtype is not as listed, or an argument is not a tensor.
    ValueError
        If a rank, shape, layout or device is not as listed; if `H` is not a multiple of `N`;
        ``k < 1``; ``t < -1``; both `k` and `out`, or neither; both `tokens_since_metadata_update`
        and `metadata_seq_lens`; no `block_size` where ``R == 1``; an `out` that overlaps itself or
        another argument;
        on the CPU also if a length is negative, ``metadata_seq_lens[b]`` is not in ``[0,
        seq_lens[b]]``, a block to be scored is beyond what the table holds, or a table entry that
        is read lies outside the pool. Devices cannot look: they clamp lengths and do not list a
        block with a bad entry.
    NotImplementedError
        If there is no backend for the device, or a limit of it is exceeded.
    RuntimeError
        If the device itself fails. Only then may anything have been written.

    Notes
    -----
    *Order.* First the window, newest block first: every block from ``(seq_lens[b] - t) //
    block_size`` on, whose metadata is missing or stale and is not read. Then the sink, block 0.
    Then all others by decreasing score. So a small `k` keeps the newest tokens. With ``t == -1``
    there is neither window nor sink.

    *Ties.* Equal scores by increasing block number; -0 equals +0; all NaN are equal and above
    +inf.

    *Padding.* Every listed block exists and none is listed twice. Slots left over hold -1.

    *Limits.* None on the CPU: any `D`, `block_size`, `R`, `k` and group size, pools beyond 2**31
    elements, ``B == 0``. The result for a request depends neither on the number of threads nor on
    the batch.

    *Cost.* The metadata of every scored block is read once. Not differentiable. Works under
    ``torch.compile``. The call returns when the work is done on the CPU, when it is queued on a
    device.

    The method is from Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
    Inference", ICML 2024.

    Examples
    --------
    A request of 40 tokens has three blocks of 16. Their keys are all 1, all 3 and all 2:

    >>> import numpy as np
    >>> from select_attn_ops import quest_block_select_paged
    >>> metadata = np.zeros((1, 16, 1, 64), np.float16)
    >>> metadata[0, :3, 0] = [[1], [3], [2]]
    >>> query = np.ones((1, 2, 64), np.float16)
    >>> table, seq_lens = np.zeros((1, 1), np.int32), np.array([40], np.int32)
    >>> quest_block_select_paged(query, metadata, metadata, table, seq_lens, k=4)
    array([[[ 1,  2,  0, -1]]], dtype=int32)

    Five tokens after the metadata was written, the last block is the window and block 0 the sink:

    >>> quest_block_select_paged(
    ...     query, metadata, metadata, table, seq_lens, k=4, tokens_since_metadata_update=5
    ... )
    array([[[ 2,  0,  1, -1]]], dtype=int32)
    """
    if (k is None) == (out is None):
        raise ValueError(f"expected either k or out, got {'neither' if k is None else 'both'}")
    new = None
    if out is None:
        k = integer("k", k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        # Slices, because a wrong rank is for the library to report, in its own words.
        shape = (*extents("query", query)[:1], *extents("maxblocks", maxblocks)[2:3], k)
        with allocating_for(query, stream):
            out = new = new_int32(shape, query)
    _select(
        (query, maxblocks, minblocks, metadata_block_tables, seq_lens, out),
        tokens_since_metadata_update,
        metadata_seq_lens,
        block_size,
        workspace,
        stream,
    )
    return out if new is None else in_kind_of(query, new)


def quest_block_select_paged_in_out(
    query: Any,
    maxblocks: Any,
    minblocks: Any,
    metadata_block_tables: Any,
    seq_lens: Any,
    selected_indices: Any,
) -> None:
    """Select KV blocks into a preallocated tensor: `quest_block_select_paged` with ``out=``.

    Parameters
    ----------
    query : tensor
        ``[B, H, D]``, float16, bfloat16 or float32.
    maxblocks, minblocks : tensor
        ``[num_meta_blocks, R, N, D]``, dtype of `query`; KV blocks have `R` tokens, ``R > 1``.
    metadata_block_tables : tensor
        ``[B, MMBPR]``, int32.
    seq_lens : tensor
        ``[B]``, int32.
    selected_indices : tensor
        ``[B, N, k]``, int32, written in full: per request and KV head the numbers within the
        request of its `k` best blocks, by decreasing score, equal scores by increasing number, -1
        where a request has fewer.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `quest_block_select_paged`, whose documentation has order, ties, padding and limits.

    Examples
    --------
    >>> import numpy as np
    >>> from select_attn_ops import quest_block_select_paged_in_out
    >>> metadata = np.zeros((1, 16, 1, 64), np.float16)
    >>> metadata[0, :3, 0] = [[1], [3], [2]]
    >>> query = np.ones((1, 2, 64), np.float16)
    >>> table, seq_lens = np.zeros((1, 1), np.int32), np.array([40], np.int32)
    >>> selected_indices = np.empty((1, 1, 2), np.int32)
    >>> quest_block_select_paged_in_out(
    ...     query, metadata, metadata, table, seq_lens, selected_indices
    ... )
    >>> selected_indices
    array([[[1, 2]]], dtype=int32)
    """
    _select(
        (query, maxblocks, minblocks, metadata_block_tables, seq_lens, selected_indices),
        out_name="selected_indices",
    )


def quest_block_select_paged_in_out_w(
    query: Any,
    maxblocks: Any,
    minblocks: Any,
    metadata_block_tables: Any,
    seq_lens: Any,
    tokens_since_metadata_update: int,
    selected_indices: Any,
) -> None:
    """Select KV blocks into a preallocated tensor, window and sink first.

    `quest_block_select_paged` with ``tokens_since_metadata_update=`` and ``out=``. The recommended
    step of a decode loop: between two updates of the metadata, the blocks it does not cover yet
    are always selected.

    Parameters
    ----------
    query : tensor
        ``[B, H, D]``, float16, bfloat16 or float32.
    maxblocks, minblocks : tensor
        ``[num_meta_blocks, R, N, D]``, dtype of `query`; KV blocks have `R` tokens, ``R > 1``.
    metadata_block_tables : tensor
        ``[B, MMBPR]``, int32.
    seq_lens : tensor
        ``[B]``, int32.
    tokens_since_metadata_update : int
        ``t``, tokens decoded since the metadata was last written: blocks from ``(seq_lens[b] - t)
        // R`` on (the window) and block 0 (the sink) are selected first. -1: nothing is forced.
    selected_indices : tensor
        ``[B, N, k]``, int32, written in full: per request and KV head the window, newest block
        first, the sink, then the others by decreasing score, equal scores by increasing number,
        -1 where a request has fewer than `k` blocks.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As `quest_block_select_paged`, whose documentation has order, ties, padding and limits.

    Examples
    --------
    >>> import numpy as np
    >>> from select_attn_ops import quest_block_select_paged_in_out_w
    >>> metadata = np.zeros((1, 16, 1, 64), np.float16)
    >>> metadata[0, :3, 0] = [[1], [3], [2]]
    >>> query = np.ones((1, 2, 64), np.float16)
    >>> table, seq_lens = np.zeros((1, 1), np.int32), np.array([40], np.int32)
    >>> selected_indices = np.empty((1, 1, 2), np.int32)
    >>> quest_block_select_paged_in_out_w(
    ...     query, metadata, metadata, table, seq_lens, 5, selected_indices
    ... )
    >>> selected_indices
    array([[[2, 0]]], dtype=int32)
    """
    _select(
        (query, maxblocks, minblocks, metadata_block_tables, seq_lens, selected_indices),
        tokens_since_metadata_update,
        out_name="selected_indices",
    )


def quest_block_select_paged_workspace_size(
    query: Any,
    maxblocks: Any,
    minblocks: Any,
    metadata_block_tables: Any,
    seq_lens: Any,
    out: Any,
    *,
    block_size: int | None = None,
) -> int:
    """Bytes of workspace that `quest_block_select_paged` needs for arguments of these shapes.

    Parameters
    ----------
    query, maxblocks, minblocks, metadata_block_tables, seq_lens, out, block_size
        As for `quest_block_select_paged`. Only shapes, dtypes and the device matter.

    Returns
    -------
    int
        Length of `workspace`. 0 on the CPU.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `quest_block_select_paged`.

    Examples
    --------
    >>> import numpy as np
    >>> from select_attn_ops import quest_block_select_paged_workspace_size
    >>> quest_block_select_paged_workspace_size(
    ...     np.zeros((1, 2, 64), np.float16), *np.zeros((2, 1, 16, 1, 64), np.float16),
    ...     np.zeros((1, 1), np.int32), np.array([40], np.int32), np.empty((1, 1, 2), np.int32),
    ... )
    0
    """
    return int(
        LIB.quest_block_select_paged_workspace_size(
            argument("query", query),
            argument("maxblocks", maxblocks),
            argument("minblocks", minblocks),
            argument("metadata_block_tables", metadata_block_tables),
            argument("seq_lens", seq_lens),
            argument("out", out),
            None if block_size is None else integer("block_size", block_size),
        )
    )


def _select(
    tensors: tuple[Any, ...],
    tokens_since_metadata_update: int = -1,
    metadata_seq_lens: Any = None,
    block_size: int | None = None,
    workspace: Any = None,
    stream: int | None = None,
    *,
    out_name: str = "out",
) -> None:
    arguments = (
        *tensors,
        integer("tokens_since_metadata_update", tokens_since_metadata_update),
        metadata_seq_lens,
        None if block_size is None else integer("block_size", block_size),
        workspace,
        stream,
    )
    every_tensor = (*tensors, metadata_seq_lens, workspace)
    written = tensors[-1:]
    if _torch_ops.call_directly(LIB.quest_block_select_paged, arguments, every_tensor, written):
        return
    if _torch_ops.takes_over(every_tensor):
        _compiled(*arguments)
    else:
        _run(*arguments, out_name=out_name)


def _run(
    query: Any,
    maxblocks: Any,
    minblocks: Any,
    metadata_block_tables: Any,
    seq_lens: Any,
    out: Any,
    tokens_since_metadata_update: int,
    metadata_seq_lens: Any,
    block_size: int | None,
    workspace: Any,
    stream: int | None,
    *,
    out_name: str = "out",  # what the caller calls it
) -> None:
    tensors = (
        argument("query", query),
        argument("maxblocks", maxblocks),
        argument("minblocks", minblocks),
        argument("metadata_block_tables", metadata_block_tables),
        argument("seq_lens", seq_lens),
        argument(out_name, out, written=True),
    )
    if workspace is None and not is_on_cpu(query):
        with allocating_for(query, stream):
            size = int(LIB.quest_block_select_paged_workspace_size(*tensors, block_size))
            workspace = new_workspace(size, query)
    LIB.quest_block_select_paged(
        *tensors,
        tokens_since_metadata_update,
        optional_argument("metadata_seq_lens", metadata_seq_lens),
        block_size,
        optional_argument("workspace", workspace, written=True),
        stream_handle(query, stream),
    )
    mark_written(out)


_compiled = _torch_ops.register(
    "quest_block_select_paged(Tensor query, Tensor maxblocks, Tensor minblocks, "
    "Tensor metadata_block_tables, Tensor seq_lens, Tensor(a!) out, "
    "SymInt tokens_since_metadata_update, Tensor? metadata_seq_lens, SymInt? block_size, "
    "Tensor(b!)? workspace, int? stream) -> ()",
    _run,
)

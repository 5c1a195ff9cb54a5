"""A selection as the block tables that any paged attention kernel takes."""

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
    mark_written,
    new_int32,
    stream_handle,
)


def selected_block_tables(
    selected_indices: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    block_size: int,
    out: Any = None,
    lens_out: Any = None,
    stream: int | None = None,
) -> tuple[Any, Any]:
    """Turn selected block numbers into physical block tables and lengths.

    What an existing paged attention kernel needs to use a selection, one row per request and KV
    head. Tensors are torch tensors, NumPy arrays or any others that speak DLPack, all on one
    device, with any strides and offset as long as the last dimension is contiguous.

    Parameters
    ----------
    selected_indices : tensor
        ``[B, N, k]``, int32: block numbers within each request, as `quest_block_select_paged`
        returns them. -1 anywhere is left out.
    block_tables : tensor
        ``[B, MKBPR]``, int32: physical KV block of each logical block of each request. Only
        entries of selected blocks are read.
    seq_lens : tensor
        ``[B]``, int32: tokens in the cache.
    block_size : int
        Tokens per KV block.
    out : tensor, optional
        ``[B, N, k]``, int32, written in full. Default: a new tensor.
    lens_out : tensor, optional
        ``[B, N]``, int32, written in full. Default: a new tensor.
    stream : int, optional
        Handle of the device's stream to run on. Default: the framework's current one.

    Returns
    -------
    tables : tensor
        `out`, ``[B, N, k]`` int32: the physical KV blocks of the selection by increasing block
        number, so that a partial last block comes last; -1 behind them.
    lens : tensor
        `lens_out`, ``[B, N]`` int32: the tokens in those blocks.

    Raises
    ------
    TypeError
        If a dtype is not int32, or an argument is not a tensor.
    ValueError
        If a rank, shape, layout or device is not as listed; ``block_size < 1``; an output
        overlaps itself or another argument; on the CPU also if a length is negative or beyond
        what the table holds, a number is below -1 or does not exist in its request, or a table
        entry that is read is negative. Devices cannot look: they leave such blocks out.
    NotImplementedError
        If there is no backend for the device, or a limit of it is exceeded.
    RuntimeError
        If the device itself fails. Only then may anything have been written.

    Notes
    -----
    A block listed twice stays listed twice, and its tokens count twice. No limits on the CPU. Not
    differentiable. Works under ``torch.compile``. The call returns when the work is done on the
    CPU, when it is queued on a device.

    Examples
    --------
    A request of 40 tokens has three blocks of 16, at 7, 5 and 9 of the pool:

    >>> import numpy as np
    >>> from select_attn_ops import selected_block_tables
    >>> tables, lens = selected_block_tables(
    ...     np.array([[[2, 0, -1]]], np.int32), np.array([[7, 5, 9]], np.int32),
    ...     np.array([40], np.int32), block_size=16,
    ... )
    >>> tables
    array([[[ 7,  9, -1]]], dtype=int32)
    >>> lens  # 16 of block 0, 8 of block 2
    array([[24]], dtype=int32)
    """
    tables, lens = out, lens_out
    if tables is None or lens is None:
        shape = extents("selected_indices", selected_indices)
        with allocating_for(selected_indices, stream):
            if tables is None:
                tables = new_int32(shape, selected_indices)
            if lens is None:
                lens = new_int32(shape[:2], selected_indices)
    inputs, written = (selected_indices, block_tables, seq_lens), (tables, lens)
    tensors = (*inputs, *written)
    arguments = (*inputs, integer("block_size", block_size), *written, stream)
    if not _torch_ops.call_directly(LIB.selected_block_tables, arguments, tensors, written):
        run = _compiled if _torch_ops.takes_over(tensors) else _run
        run(*arguments)
    return (
        out if out is not None else in_kind_of(selected_indices, tables),
        lens_out if lens_out is not None else in_kind_of(selected_indices, lens),
    )


def _run(
    selected_indices: Any,
    block_tables: Any,
    seq_lens: Any,
    block_size: int,
    out: Any,
    lens_out: Any,
    stream: int | None,
) -> None:
    LIB.selected_block_tables(
        argument("selected_indices", selected_indices),
        argument("block_tables", block_tables),
        argument("seq_lens", seq_lens),
        block_size,
        argument("out", out, written=True),
        argument("lens_out", lens_out, written=True),
        stream_handle(selected_indices, stream),
    )
    mark_written(out, lens_out)


_compiled = _torch_ops.register(
    "selected_block_tables(Tensor selected_indices, Tensor block_tables, Tensor seq_lens, "
    "SymInt block_size, Tensor(a!) out, Tensor(b!) lens_out, int? stream) -> ()",
    _run,
)

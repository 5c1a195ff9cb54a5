"""Quest metadata: the channel-wise maximum and minimum of the keys of every KV block."""

from __future__ import annotations

from typing import Any

from . import _torch_ops
from ._library import LIB, argument, mark_written, optional_argument, stream_handle


def quest_prefill_metadata(
    k_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    metadata_block_tables: Any,
    maxblocks: Any,
    minblocks: Any,
    *,
    metadata_seq_lens: Any = None,
    stream: int | None = None,
) -> None:
    """Write the Quest metadata of a paged key cache: the max and min of every block and channel.

    For every KV block ``j`` of request ``b``, over its *valid* tokens only (the last block may be
    partial), row ``j % R`` of metadata block ``metadata_block_tables[b, j // R]`` becomes the
    channel-wise maximum (minimum) of the keys. Tensors are torch tensors, NumPy arrays or any
    others that speak DLPack, all on one device, with any strides and offset as long as the last
    dimension is contiguous.

    Parameters
    ----------
    k_cache : tensor
        ``[num_kv_blocks, block_size, N, D]``, float16, bfloat16 or float32: the keys of `N` KV
        heads of `D` channels, `block_size` tokens per KV block.
    block_tables : tensor
        ``[B, MKBPR]``, int32: physical KV block of each logical block of each request.
    seq_lens : tensor
        ``[B]``, int32: tokens in the cache.
    metadata_block_tables : tensor
        ``[B, MMBPR]``, int32: the metadata blocks of each request, in order.
    maxblocks, minblocks : tensor
        ``[num_meta_blocks, R, N, D]``, dtype of `k_cache`: written. `R` metadata rows are stored
        together. ``R == block_size`` lets metadata blocks live in the pool of the KV blocks; ``R
        == 1`` with ``metadata_block_tables = block_tables`` keys the metadata by physical KV
        block, so that requests that share a prefix share its metadata.
    metadata_seq_lens : tensor, optional
        ``[B]``, int32: tokens whose metadata is already right. Only KV blocks from
        ``metadata_seq_lens[b] // block_size`` on are recomputed. Default: all of them.
    stream : int, optional
        Handle of the device's stream to run on. Default: the framework's current one.

    Raises
    ------
    TypeError
        If a dtype is not as listed, or an argument is not a tensor.
    ValueError
        If a rank, shape, layout or device is not as listed; if an output overlaps itself, a
        table or lengths; on the
        CPU also if a length is negative or beyond what the tables hold, ``metadata_seq_lens[b]``
        is not in ``[0, seq_lens[b]]``, or a table entry that is read lies outside its pool.
        Devices cannot look: they clamp lengths, give a bad KV entry a zero row, and do not write
        through a bad metadata entry.
    NotImplementedError
        If there is no backend for the device, or a limit of it is exceeded.
    RuntimeError
        If the device itself fails. Only then may anything have been written.

    Notes
    -----
    *Rows behind the end.* In a metadata block whose row 0 the call writes, the rows behind the
    request's last KV block become zero. An update that starts later writes only the rows that it
    recomputes. A request with nothing in its range writes nothing.

    *Values.* Exact: no rounding. NaN propagates, as in ``torch.maximum``; the sign of a zero and
    the payload of a NaN are unspecified.

    *Sharing.* `maxblocks` and `minblocks` may alias the K and V caches if no metadata block is
    also one of the KV blocks read. Requests of one call may share a metadata block if ``R == 1``
    and it describes the same KV block with the same valid tokens.

    *Limits.* None on the CPU: any shape, pools beyond 2**31 elements, ``B == 0``. The result
    depends neither on the number of threads nor on the batch.

    *Cost.* Every valid key of the range is read once. Not differentiable. Works under
    ``torch.compile``. The call returns when the work is done on the CPU, when it is queued on a
    device.

    The method is from Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM
    Inference", ICML 2024.

    Examples
    --------
    A request of three tokens in two KV blocks of two tokens each, one head of one channel:

    >>> import numpy as np
    >>> from select_attn_ops import quest_prefill_metadata
    >>> k_cache = np.array([[5, 9], [-1, 3]], np.float32).reshape(2, 2, 1, 1)
    >>> block_tables = np.array([[1, 0]], np.int32)  # block 1 of the pool comes first
    >>> maxblocks, minblocks = np.empty((2, 1, 2, 1, 1), np.float32)
    >>> quest_prefill_metadata(
    ...     k_cache, block_tables, np.array([3], np.int32), np.array([[0]], np.int32),
    ...     maxblocks, minblocks,
    ... )
    >>> maxblocks.ravel()  # the second block has one valid token: 9 does not count
    array([3., 5.], dtype=float32)
    >>> minblocks.ravel()
    array([-1.,  5.], dtype=float32)
    """
    written = (maxblocks, minblocks)
    tensors = (k_cache, block_tables, seq_lens, metadata_block_tables, *written, metadata_seq_lens)
    arguments = (*tensors, stream)
    if _torch_ops.call_directly(LIB.quest_prefill_metadata, arguments, tensors, written):
        return
    run = _compiled if _torch_ops.takes_over(tensors) else _run
    run(*arguments)


def _run(
    k_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    metadata_block_tables: Any,
    maxblocks: Any,
    minblocks: Any,
    metadata_seq_lens: Any,
    stream: int | None,
) -> None:
    LIB.quest_prefill_metadata(
        argument("k_cache", k_cache),
        argument("block_tables", block_tables),
        argument("seq_lens", seq_lens),
        argument("metadata_block_tables", metadata_block_tables),
        argument("maxblocks", maxblocks, written=True),
        argument("minblocks", minblocks, written=True),
        optional_argument("metadata_seq_lens", metadata_seq_lens),
        stream_handle(k_cache, stream),
    )
    mark_written(maxblocks, minblocks)


_compiled = _torch_ops.register(
    "quest_prefill_metadata(Tensor k_cache, Tensor block_tables, Tensor seq_lens, "
    "Tensor metadata_block_tables, Tensor(a!) maxblocks, Tensor(b!) minblocks, "
    "Tensor? metadata_seq_lens, int? stream) -> ()",
    _run,
)

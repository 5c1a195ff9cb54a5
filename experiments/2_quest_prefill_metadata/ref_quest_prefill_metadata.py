"""Reference of quest_prefill_metadata: plain PyTorch, one KV block at a time."""

from __future__ import annotations

import torch


def quest_prefill_metadata_ref(
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    metadata_block_tables: torch.Tensor,
    maxblocks: torch.Tensor,
    minblocks: torch.Tensor,
    *,
    metadata_seq_lens: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the pools hold after the call, given what they hold before it.

    Parameters
    ----------
    k_cache : torch.Tensor
        ``[num_kv_blocks, block_size, num_kv_heads, head_dim]``.
    block_tables : torch.Tensor
        ``[batch, max_kv_blocks_per_request]``, int32.
    seq_lens : torch.Tensor
        ``[batch]``, int32.
    metadata_block_tables : torch.Tensor
        ``[batch, max_metadata_blocks_per_request]``, int32.
    maxblocks, minblocks : torch.Tensor
        ``[num_metadata_blocks, rows, num_kv_heads, head_dim]``, not written.
    metadata_seq_lens : torch.Tensor, optional
        ``[batch]``, int32. KV blocks before ``metadata_seq_lens // block_size`` stay as they are.
    dtype : torch.dtype
        Type the maxima are taken in. They are stored values, so any type that holds them is exact.

    Returns
    -------
    maxblocks, minblocks : torch.Tensor
        New tensors; rows the call does not write keep their values.
    """
    block_size, rows = k_cache.shape[1], maxblocks.shape[1]
    maxblocks, minblocks = maxblocks.clone(), minblocks.clone()
    for b, seq_len in enumerate(seq_lens.tolist()):
        total = -(-seq_len // block_size)
        first = 0 if metadata_seq_lens is None else int(metadata_seq_lens[b]) // block_size
        for j in range(first, total):
            valid = min(block_size, seq_len - j * block_size)
            keys = k_cache[int(block_tables[b, j]), :valid].to(dtype)
            block, row = int(metadata_block_tables[b, j // rows]), j % rows
            if row == 0:
                behind = max(0, rows - (total - j))
                maxblocks[block, rows - behind :] = 0
                minblocks[block, rows - behind :] = 0
            maxblocks[block, row] = keys.amax(0).to(maxblocks.dtype)
            minblocks[block, row] = keys.amin(0).to(minblocks.dtype)
    return maxblocks, minblocks

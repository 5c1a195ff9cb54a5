"""Reference of selected_block_tables: plain Python over every row."""

from __future__ import annotations

import torch


def selected_block_tables_ref(
    selected_indices: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block tables and lengths of a selection.

    Parameters
    ----------
    selected_indices : torch.Tensor
        ``[batch, num_kv_heads, k]``, int32; -1 anywhere is an empty slot.
    block_tables : torch.Tensor
        ``[batch, max_kv_blocks_per_request]``, int32.
    seq_lens : torch.Tensor
        ``[batch]``, int32.
    block_size : int
        Tokens per KV block.

    Returns
    -------
    tables : torch.Tensor
        ``[batch, num_kv_heads, k]``, int32: physical blocks by increasing block number, then -1.
    lens : torch.Tensor
        ``[batch, num_kv_heads]``, int32: tokens in them.
    """
    tables = torch.full(tuple(selected_indices.shape), -1, dtype=torch.int32)
    lens = torch.zeros(tuple(selected_indices.shape[:2]), dtype=torch.int32)
    for b, heads in enumerate(selected_indices.tolist()):
        for n, row in enumerate(heads):
            for slot, j in enumerate(sorted(j for j in row if j != -1)):
                tables[b, n, slot] = block_tables[b, j]
                lens[b, n] += min(block_size, int(seq_lens[b]) - j * block_size)
    return tables, lens

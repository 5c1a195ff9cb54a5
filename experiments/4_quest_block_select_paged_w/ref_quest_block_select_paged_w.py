"""Reference of quest_block_select_paged_in_out_w: that of experiment 3, with its window."""

from __future__ import annotations

import torch
from ref_quest_block_select_paged import SelectionReference, quest_block_select_paged_ref


def quest_block_select_paged_w_ref(
    query: torch.Tensor,
    maxblocks: torch.Tensor,
    minblocks: torch.Tensor,
    metadata_block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens_since_metadata_update: int,
    k: int,
) -> SelectionReference:
    """Select as `quest_block_select_paged_ref` does, with KV blocks of one token per metadata row.

    Parameters
    ----------
    query : torch.Tensor
        ``[batch, num_heads, head_dim]``.
    maxblocks, minblocks : torch.Tensor
        ``[num_metadata_blocks, block_size, num_kv_heads, head_dim]``.
    metadata_block_tables : torch.Tensor
        ``[batch, max_metadata_blocks_per_request]``, int32.
    seq_lens : torch.Tensor
        ``[batch]``, int32.
    tokens_since_metadata_update : int
        Tokens whose KV blocks form the window; -1: neither window nor sink.
    k : int
        Slots per KV head.
    """
    return quest_block_select_paged_ref(
        query,
        maxblocks,
        minblocks,
        metadata_block_tables,
        seq_lens,
        k,
        tokens_since_metadata_update=tokens_since_metadata_update,
    )

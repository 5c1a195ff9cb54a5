"""Exact attention and its mass per KV block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gen_data_real_text import RealTextData

# 64 rows of 131,072 logits are 32 MiB.
_ROWS = 64


def exact_attention(
    data: RealTextData, progress: Callable[[str], None] = lambda message: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each step to all tokens up to its own, in float32, from what the caches hold.

    Returns
    -------
    mass : torch.Tensor
        ``[num_steps, num_kv_heads, num_blocks]`` float32, the softmax summed per KV block, the mean
        over the query heads that share a KV head; each row sums to 1.
    out : torch.Tensor
        ``[num_steps, num_heads, head_dim]`` float32, the output.
    """
    num_steps, num_heads, head_dim = data.query.shape
    block_size, num_kv_heads = data.k_cache.shape[1:3]
    num_blocks = data.block_tables.shape[1]
    group_size = num_heads // num_kv_heads
    mass = torch.zeros(num_steps, num_kv_heads, num_blocks, device=data.query.device)
    out = torch.zeros(num_steps, num_kv_heads, group_size, head_dim, device=data.query.device)
    steps_per_chunk = max(_ROWS // group_size, 1)
    for head in range(num_kv_heads):
        progress(f"exact attention of KV head {head + 1} of {num_kv_heads}")
        keys, values = (
            cache[data.block_tables[0], :, head].flatten(0, 1).float()
            for cache in (data.k_cache, data.v_cache)
        )
        query = data.query.unflatten(1, (num_kv_heads, group_size))[:, head].float()
        for start in range(0, num_steps, steps_per_chunk):
            chunk = slice(start, start + steps_per_chunk)
            seq_lens = data.seq_lens[chunk]
            # Steps are in rising order: blocks behind a chunk's last step hold nothing of it.
            blocks = -(-int(seq_lens[-1]) // block_size)
            logits = query[chunk] @ keys[: blocks * block_size].T * head_dim**-0.5
            token = torch.arange(blocks * block_size, device=keys.device)
            logits.masked_fill_(token >= seq_lens[:, None, None], -torch.inf)
            share = logits.softmax(-1)
            out[chunk, head] = share @ values[: blocks * block_size]
            share = share.unflatten(-1, (blocks, block_size)).sum(-1)
            mass[chunk, head, :blocks] = share.mean(1)
    return mass, out.flatten(1, 2)

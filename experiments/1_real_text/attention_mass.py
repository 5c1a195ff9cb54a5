"""Exact attention and its mass per KV block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gen_data_real_text import RealTextData
from select_attn_ops.recall.measures import attention_weights, block_sums, step_chunks


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
    for head in range(num_kv_heads):
        progress(f"exact attention of KV head {head + 1} of {num_kv_heads}")
        keys, values = (
            cache[data.block_tables[0], :, head].flatten(0, 1).float()
            for cache in (data.k_cache, data.v_cache)
        )
        query = data.query.unflatten(1, (num_kv_heads, group_size))[:, head].float()
        for steps in step_chunks(num_steps, group_size):
            seq_lens = data.seq_lens[steps]
            # Steps are in rising order: blocks behind a chunk's last step hold nothing of it.
            blocks = -(-int(seq_lens[-1]) // block_size)
            tokens = slice(blocks * block_size)
            weights = attention_weights(query[steps], keys[tokens], seq_lens[:, None] - 1)
            out[steps, head] = weights @ values[tokens]
            mass[steps, head, :blocks] = block_sums(weights, block_size).mean(1)
    return mass, out.flatten(1, 2)

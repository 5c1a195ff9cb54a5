"""A paged KV cache of Qwen3-8B shape whose keys, values and queries come from a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import text_features
import torch

HEAD_DIM = 128
BLOCK_SIZE = 128
# Blocks of other requests in the pool, so that a physical block number is not a logical one.
SPARE_BLOCKS = 16


@dataclass
class RealTextData:
    """One request of ``num_tokens`` tokens, and decode steps at some of its positions.

    Every step is a request of its own, ``num_steps`` in all; they share one row of each table
    (stride 0).
    """

    num_tokens: int
    query: torch.Tensor  # [num_steps, num_heads, head_dim]
    k_cache: torch.Tensor  # [num_kv_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor  # as k_cache
    block_tables: torch.Tensor  # [num_steps, max_kv_blocks_per_request] int32
    maxblocks: torch.Tensor  # [num_meta_blocks, block_size, num_kv_heads, head_dim]
    minblocks: torch.Tensor
    metadata_block_tables: torch.Tensor  # [num_steps, max_metadata_blocks_per_request] int32
    seq_lens: torch.Tensor  # [num_steps] int32, tokens in the cache at the step
    metadata_seq_lens: torch.Tensor  # [num_steps] int32, tokens in full blocks at the step


def step_positions(num_tokens: int, num_steps: int, rng: np.random.Generator) -> np.ndarray:
    """Rising positions in the second half of the text, one drawn from each of equal stretches."""
    edges = np.linspace(num_tokens // 2, num_tokens, num_steps + 1).astype(int)
    return rng.integers(edges[:-1], edges[1:])


def _shuffled_table(
    num_blocks: int, spare: int, num_steps: int, rng: np.random.Generator
) -> torch.Tensor:
    row = rng.permutation(num_blocks + spare)[:num_blocks].astype(np.int32)
    return torch.from_numpy(row)[None].expand(num_steps, -1)


def gen_data_real_text(
    text: Path,
    num_tokens: int,
    num_steps: int,
    seed: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda message: None,
) -> RealTextData:
    """Read the text, make the features and fill the caches; metadata is left zero.

    Raises
    ------
    text_features.TextTooShortError
        If the text has fewer than ``num_tokens`` tokens.
    """
    progress(f"reading {num_tokens:,} tokens of {text}")
    tokens = text_features.read_tokens(text, num_tokens, seed)
    rng = np.random.default_rng(seed)
    positions = step_positions(num_tokens, num_steps, rng)

    progress("token vectors: truncated SVD of the text's own co-occurrences")
    vectors = text_features.token_vectors(text_features.token_ids(tokens), HEAD_DIM)

    heads = text_features.qwen3_8b_heads()
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    num_meta_blocks = -(-num_blocks // BLOCK_SIZE)
    block_tables = _shuffled_table(num_blocks, SPARE_BLOCKS, num_steps, rng)
    metadata_block_tables = _shuffled_table(num_meta_blocks, 1, num_steps, rng)
    k_cache = torch.zeros(
        num_blocks + SPARE_BLOCKS, BLOCK_SIZE, len(heads), HEAD_DIM, dtype=torch.bfloat16
    )
    v_cache = torch.zeros_like(k_cache)
    queries = []

    def store(cache: torch.Tensor, head: int, rows: np.ndarray) -> None:
        padded = np.zeros((num_blocks * BLOCK_SIZE, HEAD_DIM), dtype=np.float32)
        padded[:num_tokens] = rows
        pages = torch.from_numpy(padded).view(num_blocks, BLOCK_SIZE, HEAD_DIM)
        cache[block_tables[0], :, head] = pages.to(cache.dtype)

    # Of their own, so that keys and queries do not depend on whether there are values.
    value_rng = np.random.default_rng([seed, 1])
    for number, head in enumerate(heads):
        progress(f"keys, values and queries of KV head {number + 1} of {len(heads)}")
        rotation = text_features.random_rotation(HEAD_DIM, rng)
        store(k_cache, number, text_features.head_keys(vectors, head, rotation))
        value_rotation = text_features.random_rotation(HEAD_DIM, value_rng)
        store(v_cache, number, text_features.head_values(vectors, value_rotation))
        queries.append(text_features.head_queries(vectors, positions, head, rotation))

    metadata = torch.zeros(
        2, num_meta_blocks + 1, *k_cache.shape[1:], dtype=k_cache.dtype, device=device
    )
    seq_lens = torch.from_numpy(positions + 1).to(torch.int32)
    return RealTextData(
        num_tokens=num_tokens,
        query=torch.from_numpy(np.concatenate(queries, axis=1)).to(device, k_cache.dtype),
        k_cache=k_cache.to(device),
        v_cache=v_cache.to(device),
        block_tables=block_tables[:1].to(device).expand(num_steps, -1),
        maxblocks=metadata[0],
        minblocks=metadata[1],
        metadata_block_tables=metadata_block_tables[:1].to(device).expand(num_steps, -1),
        seq_lens=seq_lens.to(device),
        metadata_seq_lens=(seq_lens // BLOCK_SIZE * BLOCK_SIZE).to(device),
    )

"""Inputs of paged_select_attention, with poison wherever the operator must not look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common.inputs import Operands
from common.layouts import strided_copy
from common.paged import poison_like, sprinkle_specials, tiled_normal
from gen_data_selected_block_tables import gen_data_selected_block_tables


@dataclass
class AttentionInputs(Operands):
    """Arguments of one call, without the results."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    selected_indices: torch.Tensor
    scale: float | None = None

    @property
    def positional(self) -> list[torch.Tensor]:
        """Positional arguments."""
        return self.tensors()

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments."""
        return {} if self.scale is None else {"scale": self.scale}

    def requests(self, start: int, stop: int) -> AttentionInputs:
        """Return the call for requests ``start`` to ``stop`` only, on the same pools."""
        return AttentionInputs(
            self.query[start:stop],
            self.k_cache,
            self.v_cache,
            self.block_tables[start:stop],
            self.seq_lens[start:stop],
            self.selected_indices[start:stop],
            self.scale,
        )


def _values(
    query_shape: tuple[int, ...],
    pool_shape: tuple[int, ...],
    dtype: torch.dtype,
    values: str,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, keys and values of one kind; see `gen_data_paged_select_attention`."""
    query = torch.randn(query_shape, generator=generator)
    if values == "tiled":
        return (
            query.to(dtype),
            tiled_normal(pool_shape, dtype, generator),
            tiled_normal(pool_shape, dtype, generator),
        )
    keys = torch.randn(pool_shape, generator=generator)
    contents = torch.randn(pool_shape, generator=generator)
    if values == "large":
        query *= 200
        keys *= 50
    query, keys, contents = query.to(dtype), keys.to(dtype), contents.to(dtype)
    if values == "special":
        # Rarely enough that some heads and channels stay finite.
        sprinkle_specials(keys, generator, 0.3 / (pool_shape[1] * pool_shape[3]))
        sprinkle_specials(contents, generator, 0.02 / pool_shape[1])
    return query, keys, contents


def gen_data_paged_select_attention(
    seq_lens: Sequence[int],
    k: int,
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    selection: str = "distinct",
    scale: float | None = None,
    spare_columns: int = 2,
    values: str = "normal",
    layout: str = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttentionInputs:
    """Make the inputs of one call.

    Keys and values that must not be read (of blocks that the KV head has not selected, of tokens
    behind the end, of blocks in no table) are NaN and huge; so are the gaps of the layout. Table
    entries that must not be read hold garbage.

    Parameters
    ----------
    seq_lens : sequence of int
        Tokens of each request.
    k : int
        Slots per KV head.
    num_heads, num_kv_heads, head_dim, block_size : int
        Shapes of the query, ``[batch, num_heads, head_dim]``, and of the caches,
        ``[num_kv_blocks, block_size, num_kv_heads, head_dim]``.
    dtype : torch.dtype
        float16, bfloat16 or float32.
    selection : str
        ``"distinct"`` (-1 behind, as selected), ``"scattered"`` (-1 between), ``"repeated"``
        (blocks listed more than once).
    scale : float, optional
        As in the operator.
    spare_columns : int
        Table columns beyond the longest request.
    values : str
        ``"normal"``; ``"large"`` (dot products of thousands); ``"special"`` (some NaN, infinities
        and zeros of both signs); ``"tiled"`` (normal, quick to make).
    layout : str
        Name in `common.layouts.LAYOUTS`, for every tensor.
    seed : int
        Same seed, same data.
    device : torch.device or str
        Where the tensors live.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = gen_data_selected_block_tables(
        seq_lens,
        k,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        selection=selection,
        spare_columns=spare_columns,
        layout="dense",
        seed=seed,
    )
    selected, block_tables = tables.selected_indices, tables.block_tables
    requests, heads, slots = (selected >= 0).nonzero(as_tuple=True)
    blocks = selected[requests, heads, slots].long()
    places = block_tables[requests, blocks].long()
    # Of every block in use at least one more block, so that a wrong entry does not go unnoticed.
    pool_size = int(places.max()) + 3 if len(places) else 2
    query, keys, contents = _values(
        (len(seq_lens), num_heads, head_dim),
        (pool_size, block_size, num_kv_heads, head_dim),
        dtype,
        values,
        generator,
    )
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    unread = torch.ones(pool_size, block_size, num_kv_heads, dtype=torch.bool)
    tokens = torch.arange(block_size)
    is_valid = tokens < (lens[requests].long() - blocks * block_size)[:, None]
    for place, head, valid in zip(places.tolist(), heads.tolist(), is_valid, strict=True):
        unread[place, valid, head] = False
    for pool in (keys, contents):
        pool[unread] = poison_like(pool[unread])

    def operand(data: torch.Tensor) -> torch.Tensor:
        fill = float("nan") if data.is_floating_point() else 2**31 - 1
        return strided_copy(data, layout, fill=fill, device=device)

    return AttentionInputs(
        operand(query),
        operand(keys),
        operand(contents),
        operand(block_tables),
        operand(lens),
        operand(selected),
        scale,
    )

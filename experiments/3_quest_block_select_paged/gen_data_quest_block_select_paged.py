"""Inputs of quest_block_select_paged, with poison wherever the operator must not look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common.inputs import Operands
from common.layouts import strided_copy
from common.paged import (
    ceil_div,
    make_table,
    num_blocks,
    poison_like,
    sprinkle_specials,
    tiled_normal,
)
from ref_quest_block_select_paged import forced_blocks


@dataclass
class SelectInputs(Operands):
    """Arguments of one call, without ``k`` and ``out``."""

    query: torch.Tensor
    maxblocks: torch.Tensor
    minblocks: torch.Tensor
    metadata_block_tables: torch.Tensor
    seq_lens: torch.Tensor
    metadata_seq_lens: torch.Tensor | None = None
    tokens_since_metadata_update: int = -1
    block_size: int | None = None

    @property
    def positional(self) -> list[torch.Tensor]:
        """Positional arguments."""
        return [
            self.query,
            self.maxblocks,
            self.minblocks,
            self.metadata_block_tables,
            self.seq_lens,
        ]

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments, those that are left at their default left out."""
        keywords: dict[str, Any] = {}
        if self.metadata_seq_lens is not None:
            keywords["metadata_seq_lens"] = self.metadata_seq_lens
        if self.tokens_since_metadata_update != -1:
            keywords["tokens_since_metadata_update"] = self.tokens_since_metadata_update
        if self.block_size is not None:
            keywords["block_size"] = self.block_size
        return keywords

    def requests(self, start: int, stop: int) -> SelectInputs:
        """Return the call for requests ``start`` to ``stop`` only, on the same pools."""
        known = self.metadata_seq_lens
        return SelectInputs(
            self.query[start:stop],
            self.maxblocks,
            self.minblocks,
            self.metadata_block_tables[start:stop],
            self.seq_lens[start:stop],
            None if known is None else known[start:stop],
            self.tokens_since_metadata_update,
            self.block_size,
        )


def _values(
    query_shape: tuple[int, ...],
    pool_shape: tuple[int, ...],
    dtype: torch.dtype,
    values: str,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, maxima and minima of one kind; see `gen_data_quest_block_select_paged`."""
    if values in ("exact", "ties"):
        heads = query_shape[1] // pool_shape[2]
        # The sum over a group divides without remainder, or by a power of two.
        step = 1 if heads & (heads - 1) == 0 else heads
        query = step * torch.randint(-2, 3, query_shape, generator=generator)
        bound = 2 if values == "exact" else 0
        maxima = torch.randint(-bound, bound + 1, pool_shape, generator=generator)
        minima = maxima - torch.randint(0, bound + 1, pool_shape, generator=generator)
        return query.to(dtype), maxima.to(dtype), minima.to(dtype)
    query = torch.randn(query_shape, generator=generator).to(dtype)
    if values == "tiled":
        maxima = tiled_normal(pool_shape, dtype, generator)
        return query, maxima, maxima - 1
    maxima = torch.randn(pool_shape, generator=generator)
    minima = torch.randn(pool_shape, generator=generator)
    if values != "unordered":
        maxima, minima = torch.maximum(maxima, minima), torch.minimum(maxima, minima)
    maxima, minima = maxima.to(dtype), minima.to(dtype)
    if values == "special":
        # Rarely enough that most scores stay finite.
        share = 0.3 / pool_shape[3]
        sprinkle_specials(maxima, generator, share)
        sprinkle_specials(minima, generator, share)
    return query, maxima, minima


def gen_data_quest_block_select_paged(
    seq_lens: Sequence[int],
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    rows: int = 16,
    block_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokens_since_metadata_update: int = -1,
    metadata_seq_lens: Sequence[int] | None = None,
    columns: int | None = None,
    values: str = "normal",
    layout: str = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SelectInputs:
    """Make the inputs of one call.

    Rows that must not be read (of blocks that do not exist, of window and sink, of metadata blocks
    in no table) hold NaN and huge values; table entries that must not be read hold garbage.

    Parameters
    ----------
    seq_lens : sequence of int
        Tokens of each request.
    num_heads, num_kv_heads, head_dim : int
        Shape of the query, ``[batch, num_heads, head_dim]``, and the KV heads.
    rows : int
        Metadata rows per metadata block. 1 makes a table by KV block.
    block_size : int, optional
        Tokens per KV block; left to its default, ``rows``, if left out.
    dtype : torch.dtype
        float16, bfloat16 or float32.
    tokens_since_metadata_update, metadata_seq_lens
        As in the operator; the latter as a sequence.
    columns : int, optional
        Width of the table; wider than needed if left out.
    values : str
        ``"normal"``; ``"unordered"`` (maxima and minima independent); ``"exact"`` (small whole
        numbers, so that every sum is exact and many tie); ``"ties"`` (all scores equal);
        ``"special"`` (some NaN, infinities and zeros of both signs); ``"tiled"`` (normal, quick to
        make).
    layout : str
        Name in `common.layouts.LAYOUTS`, for every tensor.
    seed : int
        Same seed, same data.
    device : torch.device or str
        Where the tensors live.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = rows if block_size is None else block_size
    totals = num_blocks(seq_lens, tokens)
    if metadata_seq_lens is not None:
        known: list[int | None] = list(metadata_seq_lens)
    elif tokens_since_metadata_update >= 0:
        known = [max(length - tokens_since_metadata_update, 0) for length in seq_lens]
    else:
        known = [None] * len(totals)
    scored = [
        sorted(set(range(total)) - set(forced_blocks(length, covered, tokens)))
        for total, length, covered in zip(totals, seq_lens, known, strict=True)
    ]
    if columns is None:
        columns = ceil_div(max(totals, default=0), rows) + 2
    table, pool_size = make_table(
        [{j // rows for j in blocks} for blocks in scored], columns, generator
    )

    query, maxima, minima = _values(
        (len(totals), num_heads, head_dim),
        (pool_size, rows, num_kv_heads, head_dim),
        dtype,
        values,
        generator,
    )
    unread = torch.ones(pool_size, rows, dtype=torch.bool)
    for b, blocks in enumerate(scored):
        j = torch.tensor(blocks, dtype=torch.long)
        unread[table[b, j // rows].long(), j % rows] = False
    for pool in (maxima, minima):
        pool[unread] = poison_like(pool[unread])

    def operand(data: torch.Tensor) -> torch.Tensor:
        fill = float("nan") if data.is_floating_point() else 2**31 - 1
        return strided_copy(data, layout, fill=fill, device=device)

    return SelectInputs(
        query=operand(query),
        maxblocks=operand(maxima),
        minblocks=operand(minima),
        metadata_block_tables=operand(table),
        seq_lens=operand(torch.tensor(seq_lens, dtype=torch.int32)),
        metadata_seq_lens=None
        if metadata_seq_lens is None
        else operand(torch.tensor(metadata_seq_lens, dtype=torch.int32)),
        tokens_since_metadata_update=tokens_since_metadata_update,
        block_size=block_size,
    )

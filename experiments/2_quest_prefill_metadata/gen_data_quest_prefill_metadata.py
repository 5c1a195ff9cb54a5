"""Inputs of quest_prefill_metadata, with poison wherever the operator must not look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common.inputs import Operands
from common.layouts import strided_copy, strided_full
from common.paged import (
    ceil_div,
    make_table,
    num_blocks,
    poison_like,
    sprinkle_specials,
    tiled_normal,
)


@dataclass
class PrefillMetadataInputs(Operands):
    """Arguments of one call."""

    k_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    metadata_block_tables: torch.Tensor
    maxblocks: torch.Tensor
    minblocks: torch.Tensor
    metadata_seq_lens: torch.Tensor | None = None

    def arguments(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Return positional and keyword arguments."""
        positional = [
            self.k_cache,
            self.block_tables,
            self.seq_lens,
            self.metadata_block_tables,
            self.maxblocks,
            self.minblocks,
        ]
        return positional, {"metadata_seq_lens": self.metadata_seq_lens}

    def requests(self, start: int, stop: int) -> PrefillMetadataInputs:
        """Return the call for requests ``start`` to ``stop`` only, on the same pools."""
        known = self.metadata_seq_lens
        return PrefillMetadataInputs(
            self.k_cache,
            self.block_tables[start:stop],
            self.seq_lens[start:stop],
            self.metadata_block_tables[start:stop],
            self.maxblocks,
            self.minblocks,
            None if known is None else known[start:stop],
        )


def _keys(
    shape: tuple[int, ...], dtype: torch.dtype, values: str, generator: torch.Generator
) -> torch.Tensor:
    """Return keys of one kind; see `gen_data_quest_prefill_metadata`."""
    if values == "tiled":
        return tiled_normal(shape, dtype, generator)
    keys = torch.randn(shape, generator=generator)
    if values == "positive":
        keys = keys.abs() + 1
    elif values == "negative":
        keys = -keys.abs() - 1
    elif values == "extreme":
        limits = torch.finfo(dtype)
        scales = torch.tensor([limits.max / 8, limits.tiny, limits.smallest_normal / 4, 1.0])
        keys = keys.clamp(-8, 8) * scales[torch.randint(4, shape, generator=generator)]
    keys = keys.to(dtype)
    if values == "special":
        sprinkle_specials(keys, generator)
    return keys


def gen_data_quest_prefill_metadata(
    seq_lens: Sequence[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    metadata_seq_lens: Sequence[int] | None = None,
    spare_columns: int = 2,
    values: str = "normal",
    layout: str = "contiguous",
    keyed_by_physical_block: bool = False,
    shared_kv_blocks: int | None = None,
    full_tables: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PrefillMetadataInputs:
    """Make the inputs of one call.

    Whatever must not be read holds NaN and huge values (tokens, blocks) or garbage (table entries).
    The metadata pools hold whole numbers from 1000 on, so that a row that is not written shows.

    Parameters
    ----------
    seq_lens : sequence of int
        Tokens of each request.
    num_kv_heads, head_dim, block_size : int
        Shape of the cache, ``[num_kv_blocks, block_size, num_kv_heads, head_dim]``.
    rows : int, optional
        Metadata rows per metadata block; ``block_size`` if left out.
    dtype : torch.dtype
        float16, bfloat16 or float32.
    metadata_seq_lens : sequence of int, optional
        Makes the call an update; entries of the KV blocks before it are garbage.
    spare_columns : int
        Table columns beyond the longest request.
    values : str
        ``"normal"``; ``"positive"`` and ``"negative"`` (whose minima and maxima are far from
        zero); ``"extreme"`` (largest and subnormal values); ``"special"`` (some NaN, infinities
        and zeros of both signs); ``"tiled"`` (normal, quick to make).
    layout : str
        Name in `common.layouts.LAYOUTS`, for every tensor.
    keyed_by_physical_block : bool
        One metadata row per physical KV block: ``metadata_block_tables`` is ``block_tables``.
    shared_kv_blocks : int, optional
        Requests share this many physical KV blocks, so that long ones fit into memory; the partial
        last block of a request stays its own.
    full_tables : bool
        Entries before the range of an update name blocks of the pools, as those of engines do;
        they must be left alone all the same.
    seed : int
        Same seed, same data.
    device : torch.device or str
        Where the tensors live.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if keyed_by_physical_block else block_size if rows is None else rows
    totals = num_blocks(seq_lens, block_size)
    first = [length // block_size for length in metadata_seq_lens or [0] * len(totals)]
    read = [range(start, total) for start, total in zip(first, totals, strict=True)]
    columns = max(totals, default=0) + spare_columns
    named = [range(total) for total in totals] if full_tables else read
    block_tables, pool_size = make_table(named, columns, generator)
    if shared_kv_blocks is not None:
        for b, blocks in enumerate(read):
            block_tables[b, blocks.start : blocks.stop] %= shared_kv_blocks
            if len(blocks) and seq_lens[b] % block_size:
                block_tables[b, blocks[-1]] = shared_kv_blocks + b
        pool_size = shared_kv_blocks + len(seq_lens)
    if keyed_by_physical_block:
        metadata_tables, metadata_pool_size = block_tables, pool_size
    else:
        metadata_tables, metadata_pool_size = make_table(
            [{j // rows for j in blocks} for blocks in named],
            ceil_div(max(totals, default=0), rows) + spare_columns,
            generator,
        )

    keys = _keys((pool_size, block_size, num_kv_heads, head_dim), dtype, values, generator)
    unused = torch.ones(pool_size, dtype=torch.bool)
    for b, blocks in enumerate(read):
        physical = block_tables[b, blocks.start : blocks.stop].long()
        unused[physical] = False
        if len(blocks) and seq_lens[b] % block_size:
            stale = keys[physical[-1], seq_lens[b] % block_size :]
            stale.copy_(poison_like(stale))
    keys[unused] = poison_like(keys[unused])

    def operand(data: torch.Tensor) -> torch.Tensor:
        fill = float("nan") if data.is_floating_point() else 2**31 - 1
        return strided_copy(data, layout, fill=fill, device=device)

    def pool(shift: int) -> torch.Tensor:
        shape = (metadata_pool_size, rows, num_kv_heads, head_dim)
        view = strided_full(shape, dtype, layout, device=device)
        before = torch.arange(shift, shift + head_dim).to(dtype)
        view.copy_(before.expand(shape))
        return view

    return PrefillMetadataInputs(
        k_cache=operand(keys),
        block_tables=operand(block_tables),
        seq_lens=operand(torch.tensor(seq_lens, dtype=torch.int32)),
        metadata_block_tables=operand(metadata_tables),
        maxblocks=pool(1000),
        minblocks=pool(2000),
        metadata_seq_lens=None
        if metadata_seq_lens is None
        else operand(torch.tensor(metadata_seq_lens, dtype=torch.int32)),
    )

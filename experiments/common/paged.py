"""Paged data: block tables, lengths, and poison for everything an operator must not read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

# Blocks of a pool that no table names.
_SPARE_BLOCKS = 3
# What stands in table entries that must not be read.
_GARBAGE = (-7, 2**31 - 1, -(2**31), 1_000_000)


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def num_blocks(seq_lens: Sequence[int], block_size: int) -> list[int]:
    """Return the number of KV blocks of each request."""
    return [ceil_div(length, block_size) for length in seq_lens]


def make_seq_lens(
    lengths: str, batch: int, longest: int, block_size: int, *, seed: int = 0
) -> list[int]:
    """Return ``batch`` lengths up to ``longest``: all ``"equal"``, or ``"ragged"``.

    Ragged lengths start with the longest one and, between random ones, those around a block
    boundary.
    """
    if lengths == "equal":
        return [longest] * batch
    edges = [longest, 0, block_size + 1, block_size, 1, block_size - 1, longest - 1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, longest + 1, (batch,), generator=generator).tolist()
    for i, edge in enumerate(edges):
        drawn[2 * i : 2 * i + 1] = [min(max(edge, 0), longest)]
    return drawn[:batch]


def make_table(
    read: Sequence[Collection[int]], columns: int, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Make a table whose entries name distinct blocks in random order.

    Parameters
    ----------
    read : sequence of collections of int
        Per request, the columns an operator may read; every other entry is garbage.
    columns : int
        Width of the table.
    generator : torch.Generator
        Source of the order.

    Returns
    -------
    table : torch.Tensor
        ``[batch, columns]``, int32.
    pool_size : int
        Number of blocks the pool needs; a few of them are in no table.
    """
    pool_size = sum(len(entries) for entries in read) + _SPARE_BLOCKS
    order = torch.randperm(pool_size, generator=generator).to(torch.int32)
    cells = torch.arange(len(read) * columns) % len(_GARBAGE)
    table = torch.tensor(_GARBAGE, dtype=torch.int32)[cells].view(len(read), columns)
    taken = 0
    for b, entries in enumerate(read):
        table[b, sorted(entries)] = order[taken : taken + len(entries)]
        taken += len(entries)
    return table, pool_size


def poison_like(data: torch.Tensor) -> torch.Tensor:
    """Return NaN and values far above and below any key, in turn, in the shape of ``data``."""
    far = torch.finfo(data.dtype).max / 4
    cycle = torch.tensor([float("nan"), far, -far]).to(data.dtype)
    return cycle[torch.arange(data.shape[-1]) % 3].expand(data.shape)


def sprinkle_specials(data: torch.Tensor, generator: torch.Generator, share: float = 0.02) -> None:
    """Replace a share of ``data`` by NaN, infinities and zeros of both signs."""
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    where = torch.rand(data.shape, generator=generator) < share
    drawn = torch.randint(len(specials), data.shape, generator=generator)
    data[where] = specials[drawn].to(data.dtype)[where]


def tiled_normal(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Return normal values that repeat after some blocks: large pools in little time."""
    tile_blocks = max(1, min(shape[0], (1 << 22) // max(1, shape[1] * shape[2] * shape[3])))
    tile = torch.randn((tile_blocks, *shape[1:]), generator=generator).to(dtype)
    return tile.repeat(ceil_div(shape[0], tile_blocks), 1, 1, 1)[: shape[0]]

"""Exact attention mass per KV block, and how much of it a choice of blocks holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..quest_block_select_paged import quest_block_select_paged
from ..quest_prefill_metadata import quest_prefill_metadata

# 64 rows of 131,072 logits are 32 MiB.
_ROWS = 64
MEASURES = ("selected", "best", "recent", "random", "recall")


def held(mass: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Mass in the listed blocks (-1 is none), ``[num_steps, num_kv_heads]``."""
    listed = mass.gather(-1, selected.clamp(min=0).long())
    return torch.where(selected >= 0, listed, 0).sum(-1)


def best_blocks(mass: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` blocks that hold the most: no choice of ``k`` blocks per KV head can hold more."""
    return mass.topk(min(k, mass.shape[-1])).indices


def recent_blocks(num_blocks: torch.Tensor, num_kv_heads: int, k: int) -> torch.Tensor:
    """The last ``k`` of each request's ``num_blocks`` blocks, the partial one included."""
    last = num_blocks[:, None, None].long() - 1
    blocks = last - torch.arange(k, device=num_blocks.device)
    return blocks.clamp(min=-1).expand(-1, num_kv_heads, -1)


def random_blocks(
    num_blocks: torch.Tensor, num_kv_heads: int, k: int, generator: torch.Generator
) -> torch.Tensor:
    """``k`` different ones of each request's blocks, all equally likely; none is forced."""
    most = int(num_blocks.max())
    lots = torch.rand(len(num_blocks), num_kv_heads, most, generator=generator)
    lots = lots.to(num_blocks.device)
    exists = torch.arange(most, device=num_blocks.device) < num_blocks[:, None, None]
    drawn = torch.where(exists, lots, -1.0).topk(min(k, most))
    return torch.where(drawn.values >= 0, drawn.indices, -1)


def recalled(best: torch.Tensor, selected: torch.Tensor, num_blocks: torch.Tensor) -> torch.Tensor:
    """Share of the best blocks that were selected, ``[num_steps, num_kv_heads]``.

    Of the ``[num_steps, num_kv_heads, k]`` best, only those among a step's ``num_blocks`` count.
    """
    exists = best < num_blocks[:, None, None]
    found = (best[..., None] == selected[..., None, :]).any(-1) & exists
    return found.sum(-1) / exists.sum(-1)


@dataclass(frozen=True)
class Layer:
    """What one layer's attention sees, after the rotary embedding.

    ``keys`` are ``[num_kv_heads, num_tokens, head_dim]``, ``queries`` ``[num_heads, num_steps,
    head_dim]`` of the same dtype, ``positions`` ``[num_steps]``: the token that a query belongs
    to, which is the last one that it attends to. ``scale`` is None for ``head_dim ** -0.5``.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    positions: torch.Tensor
    scale: float | None = None


def attention_weights(
    query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Exact attention: the softmax over the tokens up to each query's own.

    Parameters
    ----------
    query : torch.Tensor
        ``[..., num_rows, head_dim]``.
    keys : torch.Tensor
        ``[..., num_tokens, head_dim]``, in the dtype to compute in.
    positions : torch.Tensor
        ``[..., num_rows]``, the token that a query belongs to; broadcast.
    scale : float, optional
        Default: ``head_dim ** -0.5``.

    Returns
    -------
    torch.Tensor
        ``[..., num_rows, num_tokens]``.
    """
    logits = query @ keys.mT * (keys.shape[-1] ** -0.5 if scale is None else scale)
    token = torch.arange(keys.shape[-2], device=keys.device)
    return logits.masked_fill_(token > positions[..., None], -torch.inf).softmax(-1)


def block_sums(weights: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[..., num_tokens]`` summed per KV block, of which the last may be partial."""
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block_size))
    return padded.view(*padded.shape[:-1], -1, block_size).sum(-1)


def step_chunks(num_steps: int, group_size: int) -> Iterator[slice]:
    """Steps in turn, as many at a time as the logits of a group's heads may take memory for."""
    size = max(_ROWS // group_size, 1)
    return (slice(start, start + size) for start in range(0, num_steps, size))


def block_mass(layer: Layer, block_size: int) -> torch.Tensor:
    """Exact attention per KV block, in float32.

    Returns
    -------
    torch.Tensor
        ``[num_steps, num_kv_heads, num_blocks]`` float32, the softmax summed per KV block, the mean
        over the query heads that share a KV head; each row sums to 1.
    """
    num_kv_heads, num_tokens = layer.keys.shape[:2]
    num_steps = layer.queries.shape[1]
    mass = torch.zeros(num_steps, num_kv_heads, -(-num_tokens // block_size))
    groups = layer.queries.chunk(num_kv_heads)
    for head, (group, keys) in enumerate(zip(groups, layer.keys, strict=True)):
        keys = keys.float()
        for steps in step_chunks(num_steps, len(group)):
            query = group[:, steps].float()
            weights = attention_weights(query, keys, layer.positions[steps], layer.scale)
            mass[steps, head] = block_sums(weights.mean(0), block_size)
    return mass


class Selector:
    """The selection of decode steps as `QuestDecoder` makes it, all positions in one call."""

    def __init__(self, layer: Layer, block_size: int, newest: int) -> None:
        num_kv_heads, num_tokens, head_dim = layer.keys.shape
        num_blocks = -(-num_tokens // block_size)
        cache = layer.keys.new_zeros(num_blocks * block_size, num_kv_heads, head_dim)
        cache[:num_tokens] = layer.keys.transpose(0, 1)
        cache = cache.view(num_blocks, block_size, num_kv_heads, head_dim)
        self._maxblocks = cache.new_empty(num_blocks, 1, num_kv_heads, head_dim)
        self._minblocks = torch.empty_like(self._maxblocks)
        table = torch.arange(num_blocks, dtype=torch.int32)[None]
        length = torch.tensor([num_tokens], dtype=torch.int32)
        quest_prefill_metadata(cache, table, length, table, self._maxblocks, self._minblocks)
        self._block_size = block_size
        self._query = layer.queries.transpose(0, 1).contiguous()
        self._tables = table.expand(len(self._query), -1).contiguous()
        self._lens = (layer.positions + 1).to(torch.int32)
        # A row behind a step's last full block knows of later tokens: it lies in the window.
        full = self._lens // block_size - newest
        self._metadata_lens = full.clamp(min=0) * block_size

    def __call__(self, k: int) -> torch.Tensor:
        """``[num_steps, num_kv_heads, k]`` int32, -1 where a step has fewer blocks."""
        selected: torch.Tensor = quest_block_select_paged(
            self._query,
            self._maxblocks,
            self._minblocks,
            self._tables,
            self._lens,
            k,
            metadata_seq_lens=self._metadata_lens,
            block_size=self._block_size,
        )
        return selected


def measure(
    layer: Layer, block_size: int, budgets: Sequence[int], newest: int, generator: torch.Generator
) -> torch.Tensor:
    """Means over the steps, ``[len(budgets), len(MEASURES), num_kv_heads]`` float32.

    ``budgets`` are in blocks; ``newest`` full blocks are selected beside the one that is filling.
    """
    mass = block_mass(layer, block_size)
    num_kv_heads = mass.shape[1]
    num_blocks = -(-(layer.positions + 1) // block_size)
    select = Selector(layer, block_size, newest)
    rows = []
    for k in budgets:
        selected, best = select(k), best_blocks(mass, k)
        recent = recent_blocks(num_blocks, num_kv_heads, k)
        by_lot = random_blocks(num_blocks, num_kv_heads, k, generator)
        shares = [held(mass, blocks) for blocks in (selected, best, recent, by_lot)]
        shares.append(recalled(best, selected, num_blocks))
        rows.append(torch.stack(shares).mean(1))
    return torch.stack(rows)

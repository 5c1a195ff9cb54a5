"""Reference of quest_block_select_paged: plain PyTorch, one request at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Half a unit in the last place of 1.0 in float32, its largest value and its least normal one.
_UNIT = 2.0**-24
_LARGEST = torch.finfo(torch.float32).max
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SelectionReference:
    """The selection, and what is needed to judge another one.

    Parameters
    ----------
    indices : torch.Tensor
        ``[batch, num_kv_heads, k]``, int32.
    forced : list of list of int
        Per request, the window (newest block first) and the sink: what ranks above every score.
    scores : list of torch.Tensor
        Per request, ``[num_kv_heads, blocks of the request]``; 0 for forced blocks.
    errors : list of torch.Tensor
        As ``scores``: how far a float32 evaluation may be off. 0 where every order of summation is
        exact, infinite where it may overflow.
    """

    indices: torch.Tensor
    forced: list[list[int]]
    scores: list[torch.Tensor]
    errors: list[torch.Tensor]


def forced_blocks(seq_len: int, known: int | None, block_size: int) -> list[int]:
    """Return window and sink of a request whose metadata covers ``known`` tokens (None: all)."""
    total = -(-seq_len // block_size)
    if known is None or total == 0:
        return []
    window = list(range(known // block_size, total))[::-1]
    return window if 0 in window else [*window, 0]


def quest_block_select_paged_ref(
    query: torch.Tensor,
    maxblocks: torch.Tensor,
    minblocks: torch.Tensor,
    metadata_block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    k: int,
    *,
    tokens_since_metadata_update: int = -1,
    metadata_seq_lens: torch.Tensor | None = None,
    block_size: int | None = None,
    dtype: torch.dtype = torch.float64,
    error_bounds: bool = True,
) -> SelectionReference:
    """Select ``k`` KV blocks per request and KV head.

    Parameters
    ----------
    query : torch.Tensor
        ``[batch, num_heads, head_dim]``.
    maxblocks, minblocks : torch.Tensor
        ``[num_metadata_blocks, rows, num_kv_heads, head_dim]``.
    metadata_block_tables : torch.Tensor
        ``[batch, max_metadata_blocks_per_request]``, int32.
    seq_lens : torch.Tensor
        ``[batch]``, int32.
    k : int
        Slots per KV head.
    tokens_since_metadata_update : int
        -1: no block is forced.
    metadata_seq_lens : torch.Tensor, optional
        ``[batch]``, int32: tokens with metadata, instead of ``tokens_since_metadata_update``.
    block_size : int, optional
        Tokens per KV block; ``rows`` if left out.
    dtype : torch.dtype
        Type of the arithmetic. float32 makes this function the benchmark's baseline.
    error_bounds : bool
        Leave ``errors`` empty if false.

    Returns
    -------
    SelectionReference
    """
    batch, num_heads, head_dim = query.shape
    rows, num_kv_heads = maxblocks.shape[1:3]
    block_size = rows if block_size is None else block_size
    groups = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim).to(dtype)
    mean = groups.sum(2) / groups.shape[2]

    indices = torch.full((batch, num_kv_heads, k), -1, dtype=torch.int32, device=query.device)
    reference = SelectionReference(indices, [], [], [])
    for b, seq_len in enumerate(seq_lens.tolist()):
        total = -(-seq_len // block_size)
        known = None
        if metadata_seq_lens is not None:
            known = int(metadata_seq_lens[b])
        elif tokens_since_metadata_update >= 0:
            known = max(seq_len - tokens_since_metadata_update, 0)
        forced = forced_blocks(seq_len, known, block_size)

        above = set(forced)
        scored = torch.tensor([j for j in range(total) if j not in above], dtype=torch.long)
        scored = scored.to(query.device)
        physical = metadata_block_tables[b, scored // rows].long()
        maxima = maxblocks[physical, scored % rows].to(dtype)
        minima = minblocks[physical, scored % rows].to(dtype)
        score = torch.maximum(mean[b] * maxima, mean[b] * minima).sum(-1).T
        # A stable sort keeps equal scores by increasing number, and puts NaN first.
        by_rank = scored[torch.sort(score, dim=1, descending=True, stable=True).indices]

        first = torch.tensor(forced, dtype=torch.long).to(query.device).expand(num_kv_heads, -1)
        ranked = torch.cat([first, by_rank], 1)
        indices[b, :, : min(k, total)] = ranked[:, :k].to(torch.int32)

        reference.forced.append(forced)
        reference.scores.append(score.new_zeros(num_kv_heads, total).index_copy(1, scored, score))
        if error_bounds:
            error = _score_errors(groups[b], mean[b], maxima, minima, score)
            reference.errors.append(
                score.new_zeros(num_kv_heads, total).index_copy(1, scored, error)
            )
    return reference


def _score_errors(
    group: torch.Tensor,
    mean: torch.Tensor,
    maxima: torch.Tensor,
    minima: torch.Tensor,
    score: torch.Tensor,
) -> torch.Tensor:
    """Bound the error of scores evaluated in float32, in any order of summation.

    Parameters
    ----------
    group : torch.Tensor
        ``[num_kv_heads, heads per KV head, head_dim]``, the query.
    mean : torch.Tensor
        ``[num_kv_heads, head_dim]``.
    maxima, minima : torch.Tensor
        ``[blocks, num_kv_heads, head_dim]``.
    score : torch.Tensor
        ``[num_kv_heads, blocks]``.
    """
    heads, head_dim = group.shape[1:]
    magnitude = _finite(group).abs().sum(1) / heads
    size = torch.maximum(_finite(maxima).abs(), _finite(minima).abs())
    terms = (magnitude * size).sum(-1).T

    # n roundings in a row are off by at most n u / (1 - n u) of the sum of magnitudes.
    roundings = (head_dim + heads + 2) * _UNIT
    error = roundings / (1 - roundings) * terms
    # Results below the normal range may lose all their digits.
    error += _TINY * (head_dim + size.sum(-1).T)

    # Multiples of 2^-10 that add up to less than 2^14 fit into 24 bits at every step.
    exact_sum = _on_grid(group).all(1) & (magnitude * heads < 2**14)
    exact = (exact_sum & _on_grid(mean)).all(-1)
    exact = exact & (_on_grid(mean * maxima) & _on_grid(mean * minima)).all(-1)
    error[exact.T & (terms < 2**14)] = 0
    error[~score.isfinite()] = 0

    may_overflow = terms * heads > _LARGEST / 2
    may_overflow |= (magnitude * heads > _LARGEST / 2).any(-1)[:, None]
    # Whether the mean is zero decides between infinity and NaN. It may cancel to zero, of more than
    # two terms, which cancel exactly, or underflow.
    may_vanish = (mean != 0) & (mean.abs() < _TINY)
    if heads > 2:
        may_vanish |= (mean.abs() <= roundings * magnitude) & ~exact_sum
    may_overflow |= (may_vanish & (maxima.isinf() | minima.isinf())).any(-1).T
    error[may_overflow] = float("inf")
    return error


def _finite(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with 0 for NaN and infinities."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _on_grid(x: torch.Tensor) -> torch.Tensor:
    """Return where ``x`` is a multiple of 2^-10."""
    return x * 1024 == (x * 1024).round()

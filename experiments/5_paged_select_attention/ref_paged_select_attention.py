"""Reference of paged_select_attention: plain PyTorch, one request and KV head at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Half a unit in the last place of 1.0 in float32, its largest value and its least normal one.
_UNIT = 2.0**-24
_LARGEST = torch.finfo(torch.float32).max
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class AttentionReference:
    """The result, and what is needed to judge another one.

    Parameters
    ----------
    out : torch.Tensor
        ``[batch, num_heads, head_dim]``.
    lse : torch.Tensor
        ``[batch, num_heads]``.
    out_error, lse_error : torch.Tensor
        In the same shapes, how far a float32 evaluation in any order, stored in the dtype of the
        inputs, may be off. Infinite where it may overflow.
    """

    out: torch.Tensor
    lse: torch.Tensor
    out_error: torch.Tensor
    lse_error: torch.Tensor


def selected_tokens(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
    selected: list[int],
    kv_head: int,
) -> torch.Tensor:
    """Return the rows of the selected blocks' valid tokens, ``[tokens, head_dim]``."""
    block_size = cache.shape[1]
    rows = [
        cache[int(block_table[j]), : min(block_size, seq_len - j * block_size), kv_head]
        for j in selected
        if j != -1
    ]
    return torch.cat(rows) if rows else cache.new_empty(0, cache.shape[3])


def paged_select_attention_ref(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    selected_indices: torch.Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
    error_bounds: bool = True,
) -> AttentionReference:
    """Attend to the selected blocks.

    Parameters
    ----------
    query : torch.Tensor
        ``[batch, num_heads, head_dim]``.
    k_cache, v_cache : torch.Tensor
        ``[num_kv_blocks, block_size, num_kv_heads, head_dim]``.
    block_tables : torch.Tensor
        ``[batch, max_kv_blocks_per_request]``, int32.
    seq_lens : torch.Tensor
        ``[batch]``, int32.
    selected_indices : torch.Tensor
        ``[batch, num_kv_heads, k]``, int32; -1 anywhere is an empty slot.
    scale : float, optional
        Of the dot products; ``head_dim ** -0.5`` if left out.
    dtype : torch.dtype
        Type of the arithmetic. float32 makes this function the benchmark's baseline.
    error_bounds : bool
        Leave ``out_error`` and ``lse_error`` zero if false.

    Returns
    -------
    AttentionReference
    """
    batch, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, num_heads, head_dim, dtype=dtype)
    lse = torch.full((batch, num_heads), -torch.inf, dtype=dtype)
    reference = AttentionReference(out, lse, torch.zeros_like(out), torch.zeros_like(lse))
    for b, heads in enumerate(selected_indices.tolist()):
        for n, selected in enumerate(heads):
            place = (block_tables[b], int(seq_lens[b]), selected, n)
            keys = selected_tokens(k_cache, *place).to(dtype)
            values = selected_tokens(v_cache, *place).to(dtype)
            if len(keys) == 0:
                continue
            at = (b, slice(n * group, (n + 1) * group))
            queries = query[at].to(dtype)
            logits = scale * (queries @ keys.T)
            weights = logits.softmax(-1)
            out[at] = weights @ values
            # A logit of +inf makes a NaN of every weight, and is no number to go on with either.
            sums = logits.logsumexp(-1)
            lse[at] = torch.where(sums == torch.inf, torch.nan, sums)
            if error_bounds:
                errors = _errors(queries, keys, values, logits, weights, scale, query.dtype)
                reference.out_error[at], reference.lse_error[at] = errors
    return reference


def _errors(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound the errors of the heads that share some tokens.

    Parameters
    ----------
    queries : torch.Tensor
        ``[heads, head_dim]``.
    keys, values : torch.Tensor
        ``[tokens, head_dim]``.
    logits, weights : torch.Tensor
        ``[heads, tokens]``.
    scale : float
        Of the dot products.
    dtype : torch.dtype
        What the result is stored in.
    """
    tokens, head_dim = keys.shape
    # Powers of 2 in place of e, hence a factor of log2(e) on the way to a logit.
    terms = 1.5 * abs(scale) * (_finite(queries).abs() @ _finite(keys).abs().T)
    scaled = 1.5 * abs(scale) * _finite(queries).abs()
    # n roundings in a row are off by at most n u / (1 - n u) of the sum of magnitudes.
    roundings = (head_dim + 8) * _UNIT
    logit_error = (roundings / (1 - roundings) * terms).amax(-1)
    # Numbers below the normal range may lose all their digits.
    logit_error += _TINY * (head_dim + _finite(keys).abs().sum(-1).amax())

    # A weight is off by the error of its logit, that of the largest, and of a power of 2.
    sum_error = (tokens + 32) * _UNIT
    relative = torch.expm1(2 * logit_error) + 2 * sum_error
    finite_values = _finite(values).abs()
    largest_value = finite_values.amax(0)
    out_error = relative[:, None] * (weights.nan_to_num() @ finite_values)
    # Weights below 2^-126 of the largest count as 0.
    out_error += tokens * 2.0**-125 * (largest_value + 1)
    out = (weights @ values).nan_to_num().abs() + out_error
    limits = torch.finfo(dtype)
    out_error += out * limits.eps / 2 + limits.smallest_normal * limits.eps

    largest_logit = logits.abs().nan_to_num(posinf=0).amax(-1)
    lse_error = logit_error + sum_error + 4 * _UNIT * (largest_logit + 32)

    overflows = (terms > _LARGEST / 4).any(-1) | (scaled > _LARGEST / 4).any(-1)
    # Whether a product with infinity is one depends on whether the other factor vanishes.
    vanishes = ((scaled < 8 * _TINY) & (queries != 0)).any(-1) & keys.isinf().any()
    out_error[overflows | vanishes] = torch.inf
    lse_error[overflows | vanishes] = torch.inf
    out_error[:, tokens * largest_value > _LARGEST / 4] = torch.inf
    out_error[out > limits.max * (1 - limits.eps)] = torch.inf
    return out_error, lse_error


def _finite(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with 0 for NaN and infinities."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

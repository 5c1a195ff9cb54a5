"""Scores of KV blocks from what is stored of their keys, and what a selection by them holds.

Shapes: ``B`` texts, ``H`` query heads, ``N`` KV heads, ``S`` query positions, the last ones of
``L`` tokens, ``D`` channels, ``T`` blocks of ``block_size`` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from select_attn_ops.recall.measures import attention_weights, block_sums

# Above all scores, which are below 1e29: the block being filled, the newest full ones, the first.
_FILLING, _RECENT, _SINK = 3e30, 2e30, 1e30


@dataclass(frozen=True)
class Summary:
    """What is stored of a block's keys, and how a score is made of it.

    Attributes
    ----------
    kind : str
        "minmax": the bounds of each channel, a score is the largest dot product within them.
        "mean": of each channel. "deviation": mean and standard deviation, a score is the mean's
        dot product and `c` of its deviations, as if channels were independent.
    parts : int
        Sub-blocks of a block, each with a summary of its own.
    combine : str
        Of the scores of sub-blocks: "max", or "lse" for the logarithm of the sum of exponentials.
    bits : int
        Of a stored number: 32 (as computed), 16 (bfloat16), 8 or 4, the last two with one float16
        scale per row.
    keys : str
        "rotated": with their positions, as the cache has them. "plain": before RoPE, as are the
        queries then, so that scores know nothing of positions. "middle": stored before RoPE, and
        given the position of the sub-block's middle when a score is made.
    group : str
        Of the query heads that share a KV head: "query": mean of the queries. "max", "mean": of
        the heads' scores. "share": mean of the heads' softmax over blocks.
    c : float
        Deviations above the mean.
    """

    kind: str = "minmax"
    parts: int = 1
    combine: str = "max"
    bits: int = 32
    keys: str = "rotated"
    group: str = "query"
    c: float = 1.0

    @property
    def name(self) -> str:
        kind = f"mean+{self.c:g}dev" if self.kind == "deviation" else self.kind
        parts = f"/{self.parts} {self.combine}" if self.parts > 1 else ""
        keys = "" if self.keys == "rotated" else f" {self.keys}"
        return f"{kind}{parts} {self.bits}b{keys} {self.group}"

    def nbytes(self, head_dim: int) -> int:
        """Bytes per block and KV head."""
        rows = self.parts * (1 if self.kind == "mean" else 2)
        return rows * (head_dim * self.bits // 8 + (2 if self.bits < 16 else 0))


QUEST = Summary()


def to_blocks(tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[..., L, D]`` -> ``[..., T, block_size, D]``, the last block filled up with its last token.

    So that no summary of it is out of the ordinary; blocks that are not full are not scored.
    """
    missing = -tokens.shape[-2] % block_size
    if missing:
        tokens = torch.cat(
            [tokens, tokens[..., -1:, :].expand(*tokens.shape[:-2], missing, -1)], -2
        )
    return tokens.unflatten(-2, (-1, block_size))


def rounded_rows(rows: torch.Tensor, bits: int, direction: int = 0) -> torch.Tensor:
    """What is read back of rows stored in ``bits``.

    Parameters
    ----------
    rows : torch.Tensor
        ``[..., D]``.
    bits : int
        32, 16, 8 or 4.
    direction : int
        Of rounding: 0 to nearest, 1 up, -1 down, which leaves a bound a bound.
    """
    if bits >= 32:
        return rows
    if bits == 16:
        near = rows.to(torch.bfloat16)
        if direction:
            limit = torch.full_like(near, direction * math.inf)
            wrong = (near.to(rows.dtype) - rows) * direction < 0
            near = torch.where(wrong, near.nextafter(limit), near)
        return near.to(rows.dtype)
    largest = 2 ** (bits - 1) - 1
    # Rounded up, lest the scale be too small for the largest number.
    scale = rows.abs().amax(-1, keepdim=True) / largest
    scale = (scale * (1 + 2**-10)).half().to(rows.dtype).clamp(min=2**-24)
    steps = rows / scale
    steps = steps.round() if direction == 0 else (steps.ceil() if direction > 0 else steps.floor())
    return steps.clamp(-largest - 1, largest) * scale


def summary_rows(blocks: torch.Tensor, summary: Summary) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored, read back: ``[..., T, parts, D]`` twice.

    Maximum and minimum, or mean and deviation (zeros for "mean").

    Parameters
    ----------
    blocks : torch.Tensor
        ``[..., T, block_size, D]`` keys.
    """
    blocks = blocks.unflatten(-2, (summary.parts, -1))
    if summary.kind == "minmax":
        return (
            rounded_rows(blocks.amax(-2), summary.bits, 1),
            rounded_rows(blocks.amin(-2), summary.bits, -1),
        )
    mean = rounded_rows(blocks.mean(-2), summary.bits)
    if summary.kind == "mean":
        return mean, torch.zeros_like(mean)
    return mean, rounded_rows(blocks.std(-2, correction=0), summary.bits)


def row_scores(
    query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, summary: Summary
) -> torch.Tensor:
    """Scores of sub-blocks: ``[..., S, D]`` and twice ``[..., rows, D]`` -> ``[..., S, rows]``."""
    if summary.kind == "minmax":
        # max(q * hi, q * lo) is q+ * hi + q- * lo where hi >= lo.
        return query.clamp(min=0) @ first.mT + query.clamp(max=0) @ second.mT
    scores = query @ first.mT
    if summary.kind == "deviation":
        scores = scores + summary.c * (query.square() @ second.square().mT).sqrt()
    return scores


def rotate(tokens: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE as in Llama: ``[..., L, D]`` at ``[L]`` positions; negative ones take it back."""
    half = tokens.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * rates
    cos, sin = angles.cos().to(tokens), angles.sin().to(tokens)
    one, two = tokens[..., :half], tokens[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def block_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: int,
    summary: Summary,
    theta: float | None = None,
) -> torch.Tensor:
    """Scores by a summary of all blocks, whether a position sees them in full or not.

    Parameters
    ----------
    query : torch.Tensor
        ``[B, H, S, D]``, of the last ``S`` of the tokens.
    key : torch.Tensor
        ``[B, N, L, D]``, as the cache has them.
    block_size : int
    summary : Summary
    theta : float, optional
        Of RoPE; needed unless ``summary.keys`` is "rotated".

    Returns
    -------
    torch.Tensor
        ``[B, N, S, T]``.
    """
    num_steps, (num_kv_heads, length) = query.shape[2], key.shape[1:3]
    if summary.keys != "rotated":
        assert theta is not None
        key = rotate(key, -torch.arange(length), theta)
        if summary.keys == "plain":
            query = rotate(query, -torch.arange(length - num_steps, length), theta)
    full, _ = block_limits(length, num_steps, block_size)
    grouped = query.unflatten(1, (num_kv_heads, -1))
    return scores_of_blocks(grouped, to_blocks(key, block_size), full, summary, theta)


def scores_of_blocks(
    grouped: torch.Tensor,
    blocks: torch.Tensor,
    full: torch.Tensor,
    summary: Summary,
    theta: float | None = None,
) -> torch.Tensor:
    """As `block_scores`, from keys in blocks.

    Parameters
    ----------
    grouped : torch.Tensor
        ``[..., G, S, D]``, queries by KV head.
    blocks : torch.Tensor
        ``[..., T, block_size, D]``.
    full : torch.Tensor
        ``[S]``, blocks that each position sees in full.
    summary, theta
        As for `block_scores`.

    Returns
    -------
    torch.Tensor
        ``[..., S, T]``.
    """
    head_dim, block_size = blocks.shape[-1], blocks.shape[-2]
    first, second = summary_rows(blocks, summary)
    num_blocks, parts = first.shape[-3:-1]
    first, second = first.flatten(-3, -2), second.flatten(-3, -2)  # [..., rows, D]
    if summary.keys == "middle":
        assert summary.kind == "mean"
        assert theta is not None
        size = block_size // parts
        middles = torch.arange(num_blocks * parts) * size + (size - 1) / 2
        first = rotate(first, middles, theta)
    if summary.group == "query":
        grouped = grouped.mean(-3, keepdim=True)
    scores = row_scores(grouped, first.unsqueeze(-3), second.unsqueeze(-3), summary)
    scores = scores.unflatten(-1, (num_blocks, parts)) * head_dim**-0.5
    scores = scores.amax(-1) if summary.combine == "max" else scores.logsumexp(-1)
    if summary.group == "max":
        return scores.amax(-3)
    if summary.group == "share":
        # Over the blocks that a position sees in full; the others are forced or not there.
        behind = torch.arange(num_blocks) >= full[:, None]
        shares = scores.masked_fill(behind, -math.inf).softmax(-1).mean(-3)
        return shares.log().clamp(min=-1e28)
    return scores.mean(-3)


def block_limits(length: int, num_steps: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Full blocks, and all blocks, that each of the last positions sees: ``[S]`` twice."""
    seen = torch.arange(length - num_steps, length) + 1
    return seen // block_size, -(-seen // block_size)


def ranks(
    scores: torch.Tensor, length: int, block_size: int, recent_blocks: int = 1
) -> torch.Tensor:
    """Scores with what is forced above all others and what does not exist at -inf.

    In this order: the block being filled, the newest full ones, the first; as `QuestDecoder` does.
    ``[B, N, S, T]``.
    """
    num_steps, num_blocks = scores.shape[-2:]
    full, every = (n[:, None] for n in block_limits(length, num_steps, block_size))
    block = torch.arange(num_blocks)
    forced = torch.zeros(num_steps, num_blocks, dtype=torch.float64)
    forced = torch.where(block == 0, _SINK, forced)
    newest = _RECENT * (1 + block.double() / (4 * num_blocks))
    forced = torch.where((block < full) & (block >= full - recent_blocks), newest, forced)
    forced = torch.where(block >= full, _FILLING, forced)
    forced = torch.where(block >= every, -math.inf, forced)
    return torch.where(forced == 0, scores.double(), forced)


def top_blocks(ranked: torch.Tensor, k: int) -> torch.Tensor:
    """Which blocks are the ``k`` of highest rank: bool, ``[B, N, S, T]``."""
    best = ranked.topk(min(k, ranked.shape[-1]))
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best.indices, True)
    return chosen & (ranked > -math.inf)


def token_weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Exact attention: ``[B, N, G, S, L]``, softmax over the tokens that each position sees."""
    num_steps, (num_kv_heads, length) = query.shape[2], key.shape[1:3]
    grouped = query.unflatten(1, (num_kv_heads, -1))
    return attention_weights(grouped, key[:, :, None], torch.arange(length - num_steps, length))


def block_masses(query: torch.Tensor, key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Exact attention per block, ``[B, N, G, S, T]``."""
    return block_sums(token_weights(query, key), block_size)


def held(masses: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Share of each head's mass in the blocks chosen for its KV head: ``[B, N, G, S]``."""
    return (masses * chosen[:, :, None]).sum(-1)


def recall(chosen: torch.Tensor, best: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Share of the best blocks, those forced left out, that are among those chosen.

    ``[B, N, S]``; NaN where all are forced. ``ranked`` is what `ranks` returns.
    """
    best = best & (ranked < _SINK)
    return (chosen & best).sum(-1) / best.sum(-1)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, after Wilson."""
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - reach, middle + reach

"""Whole decode steps: what they take and how far their output is from exact attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from common.devices import seconds
from gen_data_real_text import RealTextData
from select_attn_ops import QuestDecoder

_ROUNDS = 9


@dataclass
class StepResult:
    """One way to make a step. ``seconds`` are the median of one step at the end of the text."""

    name: str
    k: int | None  # blocks; None for all
    seconds: float
    error: float  # of the output, see relative_error; dense at the last step, sparse at all


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over all rows of the length of the difference over the length of the exact row."""
    difference = torch.linalg.vector_norm(out.float() - exact, dim=-1)
    return float((difference / torch.linalg.vector_norm(exact, dim=-1)).mean())


def measure_steps(
    data: RealTextData, budgets: Sequence[int], exact: torch.Tensor
) -> list[StepResult]:
    """Dense by torch, dense by the operator, then sparse with every budget.

    Sparse steps are those of `QuestDecoder`: update the metadata, select, attend. Each follows one
    of dense attention by the same operator, which leaves nothing of what it needs in the caches.
    """
    num_steps, num_heads = data.query.shape[:2]
    num_kv_heads = data.k_cache.shape[2]
    num_blocks = data.block_tables.shape[1]
    last = slice(-1, None)
    query, tables, seq_lens = data.query[last], data.block_tables[last], data.seq_lens[last]
    seq_len = int(seq_lens)
    whole_text = torch.tensor([data.num_tokens], dtype=torch.int32, device=query.device)
    decoders = []
    for k in budgets:
        decoder = QuestDecoder(
            data.k_cache,
            data.v_cache,
            num_heads=num_heads,
            k=k,
            max_batch=num_steps,
            max_blocks=num_blocks,
            recent_blocks=0,  # the selection whose mass is measured
        )
        decoder.prefill(tables, whole_text)
        decoders.append(decoder)
    numbers = torch.arange(-(-seq_len // data.k_cache.shape[1]), device=query.device)
    every_block = numbers.int().expand(1, num_kv_heads, -1).contiguous()
    keys, values = (
        cache[tables[0].long()].flatten(0, 1)[:seq_len].transpose(0, 1).contiguous()[None]
        for cache in (data.k_cache, data.v_cache)
    )

    def by_torch() -> torch.Tensor:
        # The heads of a group as query tokens: faster than enable_gqa.
        groups = query.unflatten(1, (num_kv_heads, -1))
        out = torch.nn.functional.scaled_dot_product_attention(groups, keys, values)
        return out.flatten(1, 2)

    def dense() -> torch.Tensor:
        return decoders[0].attend(query, tables, seq_lens, every_block)

    def sparse(decoder: QuestDecoder) -> Callable[[], torch.Tensor]:
        return lambda: decoder.step(query, tables, seq_lens)

    calls: list[Callable[[], torch.Tensor]] = [by_torch, dense, *map(sparse, decoders)]
    rounds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(_ROUNDS):
        for taken, call in zip(rounds, calls, strict=True):
            dense()
            taken.append(seconds(call, query.device))
    names = ["torch, contiguous", "every block", *(f"{k} blocks" for k in budgets)]
    errors = [
        relative_error(by_torch(), exact[last]),
        relative_error(dense(), exact[last]),
        *(
            relative_error(decoder.step(data.query, data.block_tables, data.seq_lens), exact)
            for decoder in decoders
        ),
    ]
    return [
        StepResult(name, k, statistics.median(taken), error)
        for name, k, taken, error in zip(names, [None, None, *budgets], rounds, errors, strict=True)
    ]

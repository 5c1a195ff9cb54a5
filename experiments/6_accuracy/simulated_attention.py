"""Attention to some blocks of all tokens, for any rule that ranks blocks, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import measures
import torch
from measures import Summary
from select_attn_ops import QuestDecoder
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

NAME = "blocks-simulated"


@dataclass(frozen=True)
class Rule:
    """Which blocks a position attends to.

    Attributes
    ----------
    kind : str
        "dense"; "quest": the operators of this project; "summary": by a summary of the keys;
        "recent"; "random"; "exact": by the exact mass of a block, mean over the query heads that
        share a KV head.
    k : int
        Blocks, those forced included.
    block_size : int
    summary : Summary
        Of the keys, for "summary".
    dense_layers : int
        Layers, the first ones, that attend to everything.
    """

    kind: str = "dense"
    k: int = 0
    block_size: int = 16
    summary: Summary = measures.QUEST
    dense_layers: int = 0

    def scores(
        self, query: torch.Tensor, key: torch.Tensor, theta: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Of all blocks, ``[B, N, S, T]``, what is forced not yet above the others."""
        num_blocks = -(-key.shape[2] // self.block_size)
        shape = (*key.shape[:2], query.shape[2], num_blocks)
        if self.kind == "exact":
            return measures.block_masses(query, key, self.block_size).mean(2)
        if self.kind == "recent":
            return torch.arange(num_blocks, dtype=key.dtype).expand(shape)
        if self.kind == "random":
            return torch.rand(shape, generator=generator)
        return measures.block_scores(query, key, self.block_size, self.summary, theta)

    def chosen(
        self, query: torch.Tensor, key: torch.Tensor, theta: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Blocks to attend to: bool, ``[B, N, S, T]``."""
        scores = self.scores(query, key, theta, generator)
        return measures.top_blocks(measures.ranks(scores, key.shape[2], self.block_size), self.k)


@dataclass
class Simulation:
    """What the attention function does until told otherwise.

    Attributes
    ----------
    rule : Rule or None
        None: as sdpa, for prefill.
    seen : list
        If `keep`, query and key of every layer, in the order of the layers.
    """

    rule: Rule | None = None
    theta: float = 1e4
    keep: bool = False
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if self.rule is None:
            result: tuple[torch.Tensor, None] = AttentionInterface()["sdpa"](
                module, query, key, value, attention_mask, **kwargs
            )
            return result
        if self.keep:
            self.seen.append((query, key))
        is_sparse = self.rule.kind != "dense" and module.layer_idx >= self.rule.dense_layers
        if is_sparse and self.rule.kind == "quest":
            return _by_operators(query, key, value, self.rule).transpose(1, 2), None
        length, num_steps = key.shape[2], query.shape[2]
        visible = torch.arange(length) <= torch.arange(length - num_steps, length)[:, None]
        if is_sparse:
            chosen = self.rule.chosen(query, key, self.theta, self.generator)
            tokens = chosen.repeat_interleave(self.rule.block_size, -1)[..., :length]
            visible = (visible & tokens).repeat_interleave(query.shape[1] // key.shape[1], 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, enable_gqa=True
        )
        return out.transpose(1, 2), None


def _by_operators(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Each position's step with `QuestDecoder`, ``[B, H, S, D]``: a request of its own.

    A step does not look at metadata of blocks that are not full at its length, so that all may be
    written beforehand.
    """
    batch, _, length, head_dim = key.shape
    num_heads, num_steps = query.shape[1:3]

    def paged(tokens: torch.Tensor) -> torch.Tensor:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, -length % rule.block_size))
        blocks = tokens.transpose(1, 2).unflatten(1, (-1, rule.block_size))
        return blocks.flatten(0, 1).contiguous()

    k_cache, v_cache = paged(key), paged(value)
    columns = len(k_cache) // batch
    decoder = QuestDecoder(
        k_cache,
        v_cache,
        num_heads=num_heads,
        k=rule.k,
        max_batch=batch * num_steps,
        max_blocks=columns,
    )
    tables = torch.arange(len(k_cache), dtype=torch.int32).view(batch, columns)
    decoder.prefill(tables, torch.full((batch,), length, dtype=torch.int32))
    tables = tables.repeat_interleave(num_steps, 0)
    seq_lens = torch.arange(length - num_steps, length, dtype=torch.int32).repeat(batch) + 1
    requests = query.transpose(1, 2).flatten(0, 1).contiguous()
    selected = decoder.select(requests, tables, seq_lens)
    out = decoder.attend(requests, tables, seq_lens, selected)
    return out.view(batch, num_steps, num_heads, head_dim).transpose(1, 2)


def simulate(model: Any) -> Simulation:
    """Make a model use simulated attention, and return what steers it."""
    simulation = Simulation(theta=float(model.config.rope_parameters["rope_theta"]))
    AttentionInterface.register(NAME, simulation)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(NAME)
    return simulation


def copies(cache: DynamicCache, count: int) -> DynamicCache:
    """A cache with the one text of another, ``count`` times, to be continued differently."""
    new = DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = (t.expand(count, -1, -1, -1) for t in (layer.keys, layer.values))
        new.update(keys, values, number)
    return new

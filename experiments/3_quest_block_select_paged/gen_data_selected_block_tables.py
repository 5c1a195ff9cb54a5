"""Inputs of selected_block_tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common.inputs import Operands
from common.layouts import strided_copy
from common.paged import make_table, num_blocks


@dataclass
class TablesInputs(Operands):
    """Arguments of one call."""

    selected_indices: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    block_size: int

    @property
    def positional(self) -> list[torch.Tensor]:
        """Positional arguments."""
        return [self.selected_indices, self.block_tables, self.seq_lens]


def gen_data_selected_block_tables(
    seq_lens: Sequence[int],
    k: int,
    *,
    num_kv_heads: int = 2,
    block_size: int = 16,
    selection: str = "distinct",
    spare_columns: int = 2,
    layout: str = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TablesInputs:
    """Make a selection of random existing blocks and a table with garbage in unused entries.

    Parameters
    ----------
    seq_lens : sequence of int
        Tokens of each request.
    k : int
        Slots per KV head.
    num_kv_heads, block_size : int
        KV heads, tokens per KV block.
    selection : str
        ``"distinct"`` (-1 behind, as selected), ``"scattered"`` (-1 between), ``"repeated"``
        (blocks listed more than once).
    spare_columns : int
        Table columns beyond the longest request.
    layout : str
        Name in `common.layouts.LAYOUTS`, for every tensor.
    seed : int
        Same seed, same data.
    device : torch.device or str
        Where the tensors live.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = num_blocks(seq_lens, block_size)
    selected = torch.full((len(totals), num_kv_heads, k), -1, dtype=torch.int32)
    for b, total in enumerate(totals):
        for n in range(num_kv_heads):
            if selection == "repeated" and total:
                selected[b, n] = torch.randint(total, (k,), generator=generator)
                continue
            row = torch.randperm(total, generator=generator)[:k]
            selected[b, n, : len(row)] = row
            if selection == "scattered":
                selected[b, n] = selected[b, n][torch.randperm(k, generator=generator)]
    read = [set(selected[b][selected[b] >= 0].tolist()) for b in range(len(totals))]
    table, _ = make_table(read, max(totals, default=0) + spare_columns, generator)

    def operand(data: torch.Tensor) -> torch.Tensor:
        return strided_copy(data, layout, fill=2**31 - 1, device=device)

    return TablesInputs(
        operand(selected),
        operand(table),
        operand(torch.tensor(seq_lens, dtype=torch.int32)),
        block_size,
    )

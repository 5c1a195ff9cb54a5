"""The recommended use, from prefill through decoding, checked against the references on the way.

Metadata is built after the prefill and brought up to date every 128 decoded tokens; every step
selects KV blocks with the window of those that changed since, attends to them, and turns the
selection into block tables for another paged attention kernel.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common.compare import assert_attention_matches, assert_selection_matches, same_values
from common.devices import device_or_exit, script_parser
from common.paged import ceil_div
from ref_paged_select_attention import paged_select_attention_ref
from ref_quest_block_select_paged import quest_block_select_paged_ref
from ref_quest_prefill_metadata import quest_prefill_metadata_ref
from ref_selected_block_tables import selected_block_tables_ref
from select_attn_ops import (
    paged_select_attention,
    quest_block_select_paged_in_out_w,
    quest_prefill_metadata,
    selected_block_tables,
)

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, K = 32, 8, 128, 128, 8
UPDATE_EVERY = 128
PROMPT_LENS = (2000, 640, 77)
DTYPE = torch.bfloat16


@dataclass
class PagedCache:
    """Keys and values of a batch in KV blocks, with the metadata in blocks of the same shape."""

    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    maxblocks: torch.Tensor
    minblocks: torch.Tensor
    metadata_block_tables: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def create(cls, prompt_lens: tuple[int, ...], steps: int, device: torch.device) -> PagedCache:
        """Make a cache with random prompts and room for ``steps`` more tokens each."""
        batch = len(prompt_lens)
        columns = ceil_div(max(prompt_lens) + steps, BLOCK_SIZE)
        metadata_columns = ceil_div(columns, BLOCK_SIZE)
        block = (BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)

        def table(width: int) -> torch.Tensor:
            order = torch.randperm(batch * width).to(torch.int32)
            return order.view(batch, width).to(device)

        cache = cls(
            keys=torch.zeros(batch * columns, *block, dtype=DTYPE, device=device),
            values=torch.zeros(batch * columns, *block, dtype=DTYPE, device=device),
            block_tables=table(columns),
            maxblocks=torch.empty(batch * metadata_columns, *block, dtype=DTYPE, device=device),
            minblocks=torch.empty(batch * metadata_columns, *block, dtype=DTYPE, device=device),
            metadata_block_tables=table(metadata_columns),
            seq_lens=torch.zeros(batch, dtype=torch.int32, device=device),
        )
        for b, length in enumerate(prompt_lens):
            cache.append(b, *torch.randn(2, length, NUM_KV_HEADS, HEAD_DIM))
        return cache

    def append(self, b: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append new tokens, ``[tokens, num_kv_heads, head_dim]`` each, to request ``b``."""
        position = int(self.seq_lens[b]) + torch.arange(len(keys), device=self.keys.device)
        physical = self.block_tables[b, position // BLOCK_SIZE].long()
        self.keys[physical, position % BLOCK_SIZE] = keys.to(self.keys)
        self.values[physical, position % BLOCK_SIZE] = values.to(self.values)
        self.seq_lens[b] += len(keys)

    def update_metadata(self, known: torch.Tensor | None) -> None:
        """Rebuild the metadata of the KV blocks from token ``known`` of each request on."""
        quest_prefill_metadata(
            self.keys,
            self.block_tables,
            self.seq_lens,
            self.metadata_block_tables,
            self.maxblocks,
            self.minblocks,
            metadata_seq_lens=known,
        )


def check_metadata(cache: PagedCache) -> None:
    """Check that the rows of all tokens are those that a prefill of them would write."""
    for name, from_start in zip(
        ("maxblocks", "minblocks"),
        quest_prefill_metadata_ref(
            cache.keys.cpu(),
            cache.block_tables.cpu(),
            cache.seq_lens.cpu(),
            cache.metadata_block_tables.cpu(),
            cache.maxblocks.cpu(),
            cache.minblocks.cpu(),
        ),
        strict=True,
    ):
        assert bool(same_values(getattr(cache, name).cpu(), from_start).all()), name


def check_step(
    cache: PagedCache,
    query: torch.Tensor,
    since_update: int,
    selected: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    lens: torch.Tensor,
) -> str:
    """Check one step against the references; return what it selected for the first request."""
    reference = quest_block_select_paged_ref(
        query.cpu(),
        cache.maxblocks.cpu(),
        cache.minblocks.cpu(),
        cache.metadata_block_tables.cpu(),
        cache.seq_lens.cpu(),
        K,
        tokens_since_metadata_update=since_update,
    )
    assert_selection_matches(selected, reference)
    attention = paged_select_attention_ref(
        query.cpu(),
        cache.keys.cpu(),
        cache.values.cpu(),
        cache.block_tables.cpu(),
        cache.seq_lens.cpu(),
        selected.cpu(),
    )
    assert_attention_matches(out.cpu(), None, attention)
    expected = selected_block_tables_ref(
        selected.cpu(), cache.block_tables.cpu(), cache.seq_lens.cpu(), block_size=BLOCK_SIZE
    )
    assert torch.equal(tables.cpu(), expected[0])
    assert torch.equal(lens.cpu(), expected[1])
    return (
        f"{since_update} since the update, window and sink {reference.forced[0]}, KV head 0 "
        f"attends to blocks {selected[0, 0].tolist()}: {int(lens[0, 0])} of "
        f"{int(cache.seq_lens[0])} tokens"
    )


def run(device: torch.device, steps: int) -> None:
    """Decode ``steps`` tokens."""
    torch.manual_seed(0)
    cache = PagedCache.create(PROMPT_LENS, steps, device)
    cache.update_metadata(None)
    check_metadata(cache)
    print(f"prefill of {PROMPT_LENS} tokens on {device}: metadata built, as the reference has it")

    known, since_update = cache.seq_lens.clone(), 0
    selected = torch.empty(len(PROMPT_LENS), NUM_KV_HEADS, K, dtype=torch.int32, device=device)
    checked = {0, 1, UPDATE_EVERY - 2, UPDATE_EVERY - 1, UPDATE_EVERY, steps // 2, steps - 1}
    for step in range(steps):
        for b in range(len(PROMPT_LENS)):
            cache.append(b, *torch.randn(2, 1, NUM_KV_HEADS, HEAD_DIM))
        since_update += 1
        if since_update == UPDATE_EVERY:
            cache.update_metadata(known)
            check_metadata(cache)
            known, since_update = cache.seq_lens.clone(), 0
            print(f"step {step}: metadata updated, as a prefill of all tokens would have it")

        query = torch.randn(len(PROMPT_LENS), NUM_HEADS, HEAD_DIM).to(device, DTYPE)
        quest_block_select_paged_in_out_w(
            query,
            cache.maxblocks,
            cache.minblocks,
            cache.metadata_block_tables,
            cache.seq_lens,
            since_update,
            selected,
        )
        out = paged_select_attention(
            query, cache.keys, cache.values, cache.block_tables, cache.seq_lens, selected
        )
        tables, lens = selected_block_tables(
            selected, cache.block_tables, cache.seq_lens, block_size=BLOCK_SIZE
        )
        if step in checked:
            found = check_step(cache, query, since_update, selected, out, tables, lens)
            print(f"step {step}: {found}")
    print(f"decoded {steps} tokens; every check passed")


def main() -> None:
    parser = script_parser(__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="tokens to decode (default: 300)")
    options = parser.parse_args()
    run(device_or_exit(options.device), options.steps)


if __name__ == "__main__":
    main()

"""Pools beyond 2**31 elements. Their memory is reserved, and only a few pages of it are touched."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from select_attn_ops import (
    paged_select_attention,
    quest_block_select_paged,
    quest_prefill_metadata,
    selected_block_tables,
)

BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = 128, 8, 128
BLOCK_ELEMENTS = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM
NUM_BLOCKS = 2**31 // BLOCK_ELEMENTS + 64  # block 16384 starts at element 2**31
FAR = [NUM_BLOCKS - 1, 5, 2**31 // BLOCK_ELEMENTS, 2**30 // BLOCK_ELEMENTS, NUM_BLOCKS - 2]
ALLOWED_GROWTH = 512 << 20


@pytest.fixture(autouse=True)
def _few_pages() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < ALLOWED_GROWTH


def pool(num_blocks: int, block_size: int) -> torch.Tensor:
    return torch.empty(num_blocks, block_size, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [BLOCK_SIZE, 1])
def test_far_blocks(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seq_len = len(FAR) * BLOCK_SIZE - 50
    tables = torch.tensor([FAR], dtype=torch.int32)
    lens = torch.tensor([seq_len], dtype=torch.int32)
    k_cache = pool(NUM_BLOCKS, BLOCK_SIZE)
    keys = torch.randn(
        len(FAR) * BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, generator=generator
    ).bfloat16()
    for j, block in enumerate(FAR):
        k_cache[block] = keys[j * BLOCK_SIZE :][:BLOCK_SIZE]

    if rows == 1:  # by physical block: as far out in blocks, but small
        metadata_tables, num_metadata_blocks = tables, NUM_BLOCKS
    else:
        metadata_tables = torch.tensor([[NUM_BLOCKS - 1]], dtype=torch.int32)
        num_metadata_blocks = NUM_BLOCKS
    maxblocks, minblocks = pool(num_metadata_blocks, rows), pool(num_metadata_blocks, rows)
    quest_prefill_metadata(k_cache, tables, lens, metadata_tables, maxblocks, minblocks)

    valid = keys[:seq_len]
    for j in range(len(FAR)):
        block = valid[j * BLOCK_SIZE :][:BLOCK_SIZE]
        at = (FAR[j], 0) if rows == 1 else (NUM_BLOCKS - 1, j)
        assert torch.equal(maxblocks[at], block.amax(0))
        assert torch.equal(minblocks[at], block.amin(0))

    # A query that meets a single key wants that key's block.
    for j in range(len(FAR)):
        query = 100 * keys[j * BLOCK_SIZE + 3][None]
        scores = torch.stack(
            [
                torch.maximum(
                    query[0].double() * block.amax(0).double(),
                    query[0].double() * block.amin(0).double(),
                ).sum(-1)
                for block in valid.split(BLOCK_SIZE)
            ]
        )
        selected = quest_block_select_paged(
            query, maxblocks, minblocks, metadata_tables, lens, k=5, block_size=BLOCK_SIZE
        )
        assert torch.equal(selected[0].T.long(), scores.argsort(0, descending=True))
        physical, counts = selected_block_tables(selected, tables, lens, block_size=BLOCK_SIZE)
        assert physical[0].tolist() == [FAR] * NUM_KV_HEADS
        assert counts.tolist() == [[seq_len] * NUM_KV_HEADS]


def test_attention_to_far_blocks() -> None:
    """Every block has one key of weight, and a value of its own."""
    tables = torch.tensor([FAR], dtype=torch.int32)
    lens = torch.tensor([len(FAR) * BLOCK_SIZE], dtype=torch.int32)
    k_cache, v_cache = pool(NUM_BLOCKS, BLOCK_SIZE), pool(NUM_BLOCKS, BLOCK_SIZE)
    for j, block in enumerate(FAR):
        k_cache[block], v_cache[block] = -1.0, 0.0
        k_cache[block, 3 + j], v_cache[block, 3 + j] = 1.0, float(j + 1)
    query = torch.ones(1, NUM_KV_HEADS, HEAD_DIM).bfloat16()
    for j in range(len(FAR)):
        selected = torch.tensor([j, -1], dtype=torch.int32).expand(1, NUM_KV_HEADS, 2)
        out = paged_select_attention(query, k_cache, v_cache, tables, lens, selected, scale=1.0)
        assert (out == j + 1).all()


def test_stride_beyond_32_bits() -> None:
    """Two blocks 2**31 + 128 elements apart, as where one allocation holds all layers."""
    stride = 2**31 + HEAD_DIM
    storage = torch.empty(stride + 4 * HEAD_DIM, dtype=torch.float16)
    k_cache = storage.as_strided((2, 4, 1, HEAD_DIM), (stride, HEAD_DIM, HEAD_DIM, 1))
    k_cache[0], k_cache[1] = 1.0, torch.arange(4).half()[:, None, None]
    maxblocks, minblocks = torch.zeros(2, 1, 2, 1, HEAD_DIM, dtype=torch.float16)
    quest_prefill_metadata(
        k_cache,
        torch.tensor([[1, 0]], dtype=torch.int32),
        torch.tensor([8], dtype=torch.int32),
        torch.tensor([[0]], dtype=torch.int32),
        maxblocks,
        minblocks,
    )
    assert maxblocks[0, :, 0, 0].tolist() == [3, 1]
    assert minblocks[0, :, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("since", [0, 1, 2**31 - 2, 2**62])
def test_longest_request(since: int) -> None:
    """The longest length there is: its arithmetic must not wrap around."""
    longest, block_size = 2**31 - 1, 2**29
    metadata = torch.arange(1, 5).half().view(1, 4, 1, 1).expand(1, 4, 1, HEAD_DIM).contiguous()
    selected = quest_block_select_paged(
        torch.ones(1, 1, HEAD_DIM, dtype=torch.float16),
        metadata,
        metadata,
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([longest], dtype=torch.int32),
        k=6,
        tokens_since_metadata_update=since,
        block_size=block_size,
    )
    everything_is_window = since >= 2**31 - 2
    assert selected[0, 0].tolist() == (
        [3, 2, 1, 0, -1, -1] if everything_is_window else [3, 0, 2, 1, -1, -1]
    )


def test_everything_in_the_window_needs_no_table() -> None:
    empty = torch.empty(0, 4, 1, HEAD_DIM, dtype=torch.float16)
    selected = quest_block_select_paged(
        torch.ones(1, 1, HEAD_DIM, dtype=torch.float16),
        empty,
        empty,
        torch.empty(1, 0, dtype=torch.int32),
        torch.tensor([2**31 - 1], dtype=torch.int32),
        k=3,
        tokens_since_metadata_update=2**31 - 1,
        block_size=2,
    )
    assert selected[0, 0].tolist() == [2**30 - 1, 2**30 - 2, 2**30 - 3]

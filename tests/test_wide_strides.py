"""Every stride beyond 32 bits, and lengths at their limit, in memory that is reserved only."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from common.compare import assert_attention_matches
from gen_data_paged_select_attention import gen_data_paged_select_attention
from gen_data_quest_block_select_paged import gen_data_quest_block_select_paged
from gen_data_quest_prefill_metadata import gen_data_quest_prefill_metadata
from gen_data_selected_block_tables import gen_data_selected_block_tables
from ref_paged_select_attention import paged_select_attention_ref
from ref_quest_block_select_paged import quest_block_select_paged_ref
from ref_quest_prefill_metadata import quest_prefill_metadata_ref
from ref_selected_block_tables import selected_block_tables_ref
from select_attn_ops import (
    paged_select_attention,
    quest_block_select_paged,
    quest_prefill_metadata,
    selected_block_tables,
)

WIDE = 2**31 + 64
MOST_RESIDENT = 2 << 30
_NORESERVE = 0x4000  # MAP_NORESERVE, which Python names from 3.11 on


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    yield
    assert resident_bytes() < MOST_RESIDENT


def reserved(num_bytes: int) -> mmap.mmap:
    """Return zeros that cost no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return mmap.mmap(-1, num_bytes, flags=flags)


def spread(data: torch.Tensor, wide_dims: Sequence[int]) -> torch.Tensor:
    """Return ``data`` with more than 2**31 elements between the indices of some dimensions."""
    strides, step = [1] * data.dim(), data.shape[-1]
    for dim in reversed(range(data.dim() - 1)):
        if dim not in wide_dims:
            strides[dim] = step
            step *= data.shape[dim]
    for place, dim in enumerate(wide_dims):
        strides[dim] = (place + 1) * WIDE
    extent = 1 + sum((n - 1) * s for n, s in zip(data.shape, strides, strict=True))
    memory = reserved(extent * data.element_size())
    flat = torch.from_numpy(np.frombuffer(memory, np.uint8)).view(data.dtype)
    view = flat.as_strided(data.shape, strides)
    view.copy_(data)
    return view


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["k_cache", "maxblocks", "minblocks"])
def test_prefill_pools(name: str, dim: int) -> None:
    inputs = gen_data_quest_prefill_metadata(
        [9, 5], block_size=3, rows=3, num_kv_heads=2, head_dim=9, dtype=torch.float16
    )
    setattr(inputs, name, spread(getattr(inputs, name), [dim]))
    positional, keywords = inputs.arguments()
    dense = [tensor.contiguous() for tensor in positional]
    quest_prefill_metadata(*positional, **keywords)
    expected = quest_prefill_metadata_ref(*dense, **keywords)
    assert torch.equal(inputs.maxblocks.contiguous(), expected[0])
    assert torch.equal(inputs.minblocks.contiguous(), expected[1])


@pytest.mark.parametrize("name", ["block_tables", "metadata_block_tables"])
def test_prefill_tables(name: str) -> None:
    inputs = gen_data_quest_prefill_metadata([9, 5], block_size=3, rows=2, head_dim=9)
    setattr(inputs, name, spread(getattr(inputs, name), [0]))
    positional, keywords = inputs.arguments()
    dense = [tensor.clone() for tensor in positional]
    quest_prefill_metadata(*positional, **keywords)
    expected = quest_prefill_metadata_ref(*dense, **keywords)
    assert torch.equal(inputs.maxblocks, expected[0])
    assert torch.equal(inputs.minblocks, expected[1])


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("query", 0),
        ("query", 1),
        ("maxblocks", 0),
        ("maxblocks", 1),
        ("maxblocks", 2),
        ("minblocks", 0),
        ("minblocks", 1),
        ("minblocks", 2),
        ("metadata_block_tables", 0),
    ],
)
def test_select(name: str, dim: int) -> None:
    inputs = gen_data_quest_block_select_paged(
        [9, 16], num_heads=4, rows=3, head_dim=9, values="exact", dtype=torch.float16
    )
    expected = quest_block_select_paged_ref(*inputs.positional, 4).indices
    setattr(inputs, name, spread(getattr(inputs, name), [dim]))
    out = torch.full((2, 2, 4), -77, dtype=torch.int32)
    quest_block_select_paged(*inputs.positional, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *(("query", dim) for dim in (0, 1)),
        *((name, dim) for name in ("k_cache", "v_cache") for dim in (0, 1, 2)),
        ("block_tables", 0),
        *(("selected_indices", dim) for dim in (0, 1)),
        *(("out", dim) for dim in (0, 1)),
        ("lse", 0),
    ],
)
def test_attention(name: str, dim: int) -> None:
    inputs = gen_data_paged_select_attention(
        [9, 16], 4, num_heads=4, block_size=3, head_dim=9, dtype=torch.float16
    )
    reference = paged_select_attention_ref(*inputs.positional)
    outputs = {"out": torch.full((2, 4, 9), -77).half(), "lse": torch.full((2, 4), -77.0)}
    if name in outputs:
        outputs[name] = spread(outputs[name], [dim])
    else:
        setattr(inputs, name, spread(getattr(inputs, name), [dim]))
    paged_select_attention(*inputs.positional, **outputs)
    assert_attention_matches(outputs["out"], outputs["lse"], reference)


@pytest.mark.parametrize("dim", [0, 1])
def test_selection(dim: int) -> None:
    """Written by one operator, read by the next."""
    inputs = gen_data_quest_block_select_paged([9, 16], rows=3, head_dim=9, values="exact")
    selected = spread(torch.full((2, 2, 4), -77, dtype=torch.int32), [dim])
    quest_block_select_paged(*inputs.positional, out=selected)
    assert torch.equal(selected, quest_block_select_paged_ref(*inputs.positional, 4).indices)

    tables = gen_data_selected_block_tables([9, 16], 4, block_size=3, spare_columns=0)
    expected = selected_block_tables_ref(*tables.positional, block_size=3)
    results = selected_block_tables(
        spread(tables.selected_indices, [dim]),
        spread(tables.block_tables, [0]),
        tables.seq_lens,
        block_size=3,
        out=spread(torch.full((2, 2, 4), -77, dtype=torch.int32), [dim]),
        lens_out=spread(torch.full((2, 2), -77, dtype=torch.int32), [0]),
    )
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_last_block_of_the_longest_request() -> None:
    """An update of 2**31 - 1 tokens, of which only those of the last block are read."""
    longest, block_size = 2**31 - 1, 1_000_003
    total = -(-longest // block_size)
    valid = longest - (total - 1) * block_size
    # All tokens of a block share one row, so that no memory is needed for them.
    keys = torch.tensor([[3.0, -4.0], [7.0, 8.0]]).view(2, 1, 1, 2).expand(2, block_size, 1, 2)
    tables = torch.full((1, total), -9, dtype=torch.int32)
    tables[0, -1] = 1
    rows = 16
    metadata_tables = torch.full((1, -(-total // rows)), -9, dtype=torch.int32)
    metadata_tables[0, -1] = 0
    maxblocks, minblocks = torch.zeros(2, 1, rows, 1, 2)
    quest_prefill_metadata(
        keys,
        tables,
        torch.tensor([longest], dtype=torch.int32),
        metadata_tables,
        maxblocks,
        minblocks,
        metadata_seq_lens=torch.tensor([longest - valid], dtype=torch.int32),
    )
    row = (total - 1) % rows
    for pool in (maxblocks, minblocks):
        assert pool[0, row, 0].tolist() == [7, 8]
        pool[0, row] = 0
        assert (pool == 0).all()


@pytest.mark.parametrize("block_size", [2**30, 2**31 - 1, 2**31, 2**40, 2**62])
def test_block_sizes_beyond_any_length(block_size: int) -> None:
    lens = torch.tensor([2**31 - 1, 1, 0], dtype=torch.int32)
    blocks = [-(-length // block_size) for length in lens.tolist()]
    inputs = gen_data_quest_block_select_paged([1, 1, 0], rows=2, head_dim=8)
    inputs.metadata_block_tables[:, 0] = 0
    inputs.seq_lens = lens
    inputs.block_size = block_size
    selected = quest_block_select_paged(*inputs.positional, 3, block_size=block_size)
    for row, total in zip(selected[:, 0], blocks, strict=True):
        assert sorted(row.tolist()) == [*[-1] * (3 - total), *range(total)]
    table = torch.arange(6, dtype=torch.int32).view(3, 2)
    _, tokens = selected_block_tables(selected, table, lens, block_size=block_size)
    assert tokens[:, 0].tolist() == lens.tolist()

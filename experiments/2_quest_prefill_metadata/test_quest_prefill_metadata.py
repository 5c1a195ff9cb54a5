"""quest_prefill_metadata against its reference; as a script, a smoke test."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from common.compare import assert_written, same_values
from common.devices import device_or_exit, script_parser
from common.layouts import CACHE_LAYOUTS, clone_with_storage, strided_copy
from common.paged import make_seq_lens, num_blocks
from common.sweeps import DTYPES, Grid, parametrize
from gen_data_quest_prefill_metadata import PrefillMetadataInputs, gen_data_quest_prefill_metadata
from ref_quest_prefill_metadata import quest_prefill_metadata_ref
from select_attn_ops import quest_prefill_metadata


def check(inputs: PrefillMetadataInputs) -> None:
    """Run the operator, then the reference on what the pools held before, and compare."""
    before = inputs.snapshot()
    positional, keywords = inputs.arguments()
    quest_prefill_metadata(*positional, **keywords)
    compare(inputs, before)


def compare(inputs: PrefillMetadataInputs, before: PrefillMetadataInputs) -> None:
    """Check the pools after a call against the reference on ``before``."""
    positional, keywords = before.map(torch.Tensor.cpu).arguments()
    maxima, minima = quest_prefill_metadata_ref(*positional, **keywords)
    assert_written("maxblocks", inputs.maxblocks, before.maxblocks, maxima)
    assert_written("minblocks", inputs.minblocks, before.minblocks, minima)


def update_from(update: str, seq_lens: list[int], block_size: int) -> list[int] | None:
    """Return lengths at which the metadata was last right, for one kind of update."""
    if update == "none":
        return None
    known = [max(0, length - 1 - (37 * b) % (3 * block_size)) for b, length in enumerate(seq_lens)]
    if update == "aligned":
        return [length // block_size * block_size for length in known]
    return [
        min(length, max(0, before - (before % block_size == 0)))
        for before, length in zip(known, seq_lens, strict=True)
    ]


def sweep_inputs(
    *,
    batch: int,
    metadata_blocks: int,
    lengths: str,
    update: str,
    block_size: int,
    rows: int,
    device: torch.device,
    **options: object,
) -> PrefillMetadataInputs:
    """Make the inputs of one point of a sweep."""
    longest = metadata_blocks * rows * block_size - (lengths == "ragged") * (block_size // 3)
    seq_lens = make_seq_lens(lengths, batch, longest, block_size, seed=batch)
    return gen_data_quest_prefill_metadata(
        seq_lens,
        block_size=block_size,
        rows=rows,
        metadata_seq_lens=update_from(update, seq_lens, block_size),
        device=device,
        **options,
    )


def smoke(device: torch.device) -> str:
    """Check one prefill and one update of the same request; return what was checked."""
    seq_lens, block_size = [128 * 3 + 17, 128, 0], 128
    shape = {"num_kv_heads": 8, "head_dim": 128, "block_size": block_size, "device": device}
    check(gen_data_quest_prefill_metadata(seq_lens, **shape))
    check(gen_data_quest_prefill_metadata(seq_lens, metadata_seq_lens=[256, 128, 0], **shape))
    return (
        f"quest_prefill_metadata on {device}: bfloat16, {len(seq_lens)} requests of {seq_lens} "
        f"tokens, KV blocks of {block_size}: metadata of {sum(num_blocks(seq_lens, block_size))} "
        "KV blocks as the reference has it, then an update from tokens [256, 128, 0] on; "
        "rows behind a request zero, every other byte untouched"
    )


def test_smoke(device: torch.device) -> None:
    smoke(device)


@parametrize(
    Grid(
        {
            "dtype": DTYPES,
            "layout": CACHE_LAYOUTS,
            "rows": (16, 4),
            "update": ("none", "aligned", "unaligned"),
        }
    ).all()
)
def test_basic(case: dict, device: torch.device) -> None:
    inputs = sweep_inputs(
        batch=4, metadata_blocks=3, lengths="ragged", block_size=16, device=device, **case
    )
    read_only = [inputs.k_cache, inputs.block_tables, inputs.seq_lens]
    copies = [clone_with_storage(tensor) for tensor in read_only]
    check(inputs)
    for tensor, copy in zip(read_only, copies, strict=True):
        assert_written("an input", tensor, copy, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_basic_numpy(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("NumPy arrays live on the CPU")
    inputs = gen_data_quest_prefill_metadata([70, 16], dtype=dtype)
    before = inputs.snapshot()
    positional, _ = inputs.arguments()
    quest_prefill_metadata(*(tensor.numpy() for tensor in positional))
    compare(inputs, before)


EDGES = {
    "empty_batch": {"seq_lens": []},
    "empty_tables": {"seq_lens": [0, 0], "spare_columns": 0},
    "length_0": {"seq_lens": [0, 20, 0]},
    "length_1": {"seq_lens": [1]},
    "one_token_short_of_a_block": {"seq_lens": [15, 31, 63]},
    "whole_blocks": {"seq_lens": [16, 32, 64]},
    "one_token_into_a_block": {"seq_lens": [17, 33, 65]},
    "whole_metadata_block": {"seq_lens": [256, 512]},
    "one_block_into_a_metadata_block": {"seq_lens": [257, 272, 513]},
    "block_size_1": {"seq_lens": [1, 2, 5], "block_size": 1},
    "odd_block_size": {"seq_lens": [100, 13, 14], "block_size": 13, "rows": 3},
    "block_of_more_tokens_than_a_chunk": {"seq_lens": [2000, 999], "block_size": 1000, "rows": 2},
    "one_row": {"seq_lens": [100, 16], "rows": 1},
    "more_rows_than_blocks": {"seq_lens": [100, 16], "rows": 300},
    "keyed_by_physical_block": {"seq_lens": [100, 16, 1], "keyed_by_physical_block": True},
    "keyed_update": {
        "seq_lens": [100, 16, 1],
        "keyed_by_physical_block": True,
        "metadata_seq_lens": [64, 16, 0],
    },
    "one_head": {"seq_lens": [100], "num_kv_heads": 1},
    "odd_heads": {"seq_lens": [100], "num_kv_heads": 7},
    "many_heads": {"seq_lens": [100], "num_kv_heads": 64},
    **{
        f"head_dim_{d}": {"seq_lens": [100, 7], "head_dim": d}
        for d in (1, 2, 7, 8, 15, 33, 65, 100, 128, 129, 256, 300)
    },
    "keys_above_zero": {"seq_lens": [100, 7], "values": "positive"},
    "keys_below_zero": {"seq_lens": [100, 7], "values": "negative"},
    "extreme_keys": {"seq_lens": [100, 7], "values": "extreme"},
    "special_keys": {"seq_lens": [1000, 7], "values": "special"},
    "update_of_nothing": {"seq_lens": [64, 16, 0, 256], "metadata_seq_lens": [64, 16, 0, 256]},
    "update_of_a_partial_block": {"seq_lens": [70, 17], "metadata_seq_lens": [70, 17]},
    "update_from_0": {"seq_lens": [70, 17, 0], "metadata_seq_lens": [0, 0, 0]},
    "update_within_a_metadata_block": {
        "seq_lens": [200, 300],
        "rows": 8,
        "metadata_seq_lens": [48, 16 * 9 + 1],
    },
    "update_into_a_new_metadata_block": {
        "seq_lens": [16 * 9 + 1, 16 * 17],
        "rows": 8,
        "metadata_seq_lens": [16 * 7, 16 * 6 + 3],
    },
    "update_at_a_new_metadata_block": {
        "seq_lens": [16 * 9 + 1, 16 * 17],
        "rows": 8,
        "metadata_seq_lens": [16 * 8, 16 * 16],
    },
}


@pytest.mark.parametrize("full_tables", [False, True], ids=["garbage", "full_tables"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_edge(edge: str, dtype: torch.dtype, full_tables: bool, device: torch.device) -> None:
    check(
        gen_data_quest_prefill_metadata(
            dtype=dtype, full_tables=full_tables, device=device, **EDGES[edge]
        )
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [0, 14, 15, 16, 99])
def test_edge_one_special_token(token: int, poison: float, device: torch.device) -> None:
    inputs = gen_data_quest_prefill_metadata([100], device=device)
    block = int(inputs.block_tables[0, token // 16])
    inputs.k_cache[block, token % 16, :, ::3] = poison
    check(inputs)


def test_edge_one_pool(device: torch.device) -> None:
    """Metadata blocks may come from the pools that hold keys and values."""
    inputs = gen_data_quest_prefill_metadata([100, 256, 300], device=device)
    kv_blocks = len(inputs.k_cache)
    keys = torch.cat([inputs.k_cache, inputs.maxblocks])
    inputs.k_cache = inputs.maxblocks = strided_copy(keys, "interleaved", device=device)
    inputs.minblocks = strided_copy(keys, "interleaved", device=device)
    named = (inputs.metadata_block_tables >= 0) & (inputs.metadata_block_tables < kv_blocks)
    inputs.metadata_block_tables[named] += kv_blocks
    before = inputs.snapshot()
    positional, keywords = inputs.arguments()
    quest_prefill_metadata(*positional, **keywords)
    compare(inputs, before)


def test_edge_shared_prefix(device: torch.device) -> None:
    """Requests that share KV blocks share their metadata, keyed by physical block."""
    inputs = gen_data_quest_prefill_metadata(
        [100, 64 + 5, 64], keyed_by_physical_block=True, device=device
    )
    for table in (inputs.block_tables, inputs.metadata_block_tables):
        table[1:, :4] = table[0, :4].clone()
    check(inputs)


def test_edge_batch_does_not_matter(device: torch.device) -> None:
    """A request's rows are the same whether it comes alone or with others."""
    together = gen_data_quest_prefill_metadata([100, 0, 256, 300], values="special", device=device)
    alone = together.snapshot()
    positional, _ = together.arguments()
    quest_prefill_metadata(*positional)
    for b in range(len(alone.seq_lens)):
        positional, _ = alone.requests(b, b + 1).arguments()
        quest_prefill_metadata(*positional)
    for name in ("maxblocks", "minblocks"):
        assert same_values(getattr(alone, name), getattr(together, name)).all(), name


SWEEP_HEAD_DIM = 32


def _fits(*, batch: int, num_kv_heads: int, metadata_blocks: int, rows: int, **_: object) -> bool:
    # Keys of at most 4 MiB in float32.
    return batch * num_kv_heads * metadata_blocks * rows * 16 * SWEEP_HEAD_DIM <= 1 << 20


EXTENSIVE = Grid(
    {
        "dtype": DTYPES,
        "batch": (1, 3, 32),
        "num_kv_heads": (1, 8, 10, 64),
        "metadata_blocks": (1, 2, 3, 4, 5, 6, 40),
        "rows": (16, 5, 1),
        "lengths": ("equal", "ragged"),
        "update": ("none", "aligned", "unaligned"),
        "layout": ("contiguous", "unaligned"),
    },
    keep=_fits,
)


@pytest.mark.extensive(full=EXTENSIVE.all, sample=EXTENSIVE.sample(60))
def test_extensive(case: dict, device: torch.device) -> None:
    check(sweep_inputs(block_size=16, head_dim=SWEEP_HEAD_DIM, device=device, **case))


LARGE = Grid(
    {
        "dtype": DTYPES,
        "batch": (1, 8, 32),
        "metadata_blocks": (4, 8),
        "lengths": ("equal", "ragged"),
        "update": ("none", "unaligned"),
    }
)
LARGE_SAMPLE = [
    {"dtype": dtype, "batch": 1, "metadata_blocks": 4, "lengths": "ragged", "update": update}
    for dtype, update in zip(DTYPES, ("none", "unaligned", "none"), strict=True)
]


@pytest.mark.large(full=LARGE.all, sample=LARGE_SAMPLE)
def test_large(case: dict, device: torch.device) -> None:
    """Up to 131,072 tokens per request, at the original's shape."""
    check(
        sweep_inputs(
            num_kv_heads=8,
            head_dim=128,
            block_size=128,
            rows=128,
            values="tiled",
            shared_kv_blocks=512,
            device=device,
            **case,
        )
    )


if __name__ == "__main__":
    print(smoke(device_or_exit(script_parser(__doc__).parse_args().device)))

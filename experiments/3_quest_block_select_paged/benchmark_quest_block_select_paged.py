"""Time and bandwidth of quest_block_select_paged at the original's shapes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.bench import Benchmark, part_of
from common.compare import assert_selection_matches
from gen_data_quest_block_select_paged import SelectInputs, gen_data_quest_block_select_paged
from ref_quest_block_select_paged import quest_block_select_paged_ref
from select_attn_ops import quest_block_select_paged_in_out

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, K = 32, 8, 128, 128, 16


def run_case(
    bench: Benchmark,
    name: str,
    operator: Callable[[SelectInputs, torch.Tensor], None],
    batch: int,
    metadata_blocks: int,
    dtype: torch.dtype,
    tokens_since_metadata_update: int = -1,
) -> None:
    """Measure selections for ``batch`` requests that fill ``metadata_blocks`` each.

    Parameters
    ----------
    bench : Benchmark
        Measures and prints.
    name : str
        What the line calls the operator.
    operator : callable
        Runs it on inputs and a result.
    batch, metadata_blocks, dtype, tokens_since_metadata_update
        The case.
    """
    kv_blocks = metadata_blocks * BLOCK_SIZE
    seq_len = kv_blocks * BLOCK_SIZE
    window = max(tokens_since_metadata_update, 0)
    # The window ends with the request, and the sink is not scored either.
    scored = kv_blocks - -(-window // BLOCK_SIZE) - (tokens_since_metadata_update >= 0)
    rows = 2 * batch * scored * NUM_KV_HEADS
    queries = batch * NUM_HEADS
    bytes_per_call = (rows + queries) * HEAD_DIM * dtype.itemsize + batch * NUM_KV_HEADS * K * 4
    rotations = bench.rotations(bytes_per_call)
    inputs = gen_data_quest_block_select_paged(
        [seq_len] * (batch * rotations),
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        rows=BLOCK_SIZE,
        dtype=dtype,
        tokens_since_metadata_update=tokens_since_metadata_update,
        columns=metadata_blocks,
        values="tiled",
        layout="dense",
        device=bench.device,
    )
    calls = [inputs.requests(r * batch, (r + 1) * batch) for r in range(rotations)]
    out = torch.empty((batch, NUM_KV_HEADS, K), dtype=torch.int32, device=bench.device)

    def check() -> None:
        operator(calls[0], out)
        reference = quest_block_select_paged_ref(*calls[0].positional, K, **calls[0].keywords)
        assert_selection_matches(out, reference)

    bench.case(
        name,
        f"B={batch} H={NUM_HEADS} N={NUM_KV_HEADS} D={HEAD_DIM} MMBPR={metadata_blocks} k={K}",
        dtype,
        lambda r: operator(calls[r], out),
        lambda r: quest_block_select_paged_ref(
            *calls[r].positional, K, **calls[r].keywords, dtype=torch.float32, error_bounds=False
        ),
        [
            [
                part_of(pool, r, batch * metadata_blocks)
                for pool in (inputs.maxblocks, inputs.minblocks)
            ]
            for r in range(rotations)
        ],
        bytes_per_call,
        check,
    )


def run_all(
    description: str,
    name: str,
    operator: Callable[[SelectInputs, torch.Tensor], None],
    tokens_since_metadata_update: int = -1,
) -> None:
    """Run the benchmark of one selection operator."""
    bench = Benchmark(description)
    shapes = itertools.product((10, 20, 24, 32), (1, 2, 4, 6))
    for dtype in bench.dtypes:
        for batch, metadata_blocks in [(10, 1), (10, 4)] if bench.quick else list(shapes):
            run_case(
                bench,
                name,
                operator,
                batch,
                metadata_blocks,
                dtype,
                tokens_since_metadata_update,
            )


if __name__ == "__main__":
    run_all(
        __doc__,
        "quest_block_select_paged",
        lambda inputs, out: quest_block_select_paged_in_out(*inputs.positional, out),
    )

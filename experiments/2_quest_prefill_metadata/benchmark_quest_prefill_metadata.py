"""Time and bandwidth of quest_prefill_metadata at the original's shapes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import select_attn_ops
import torch
from common.bench import Benchmark, part_of
from common.compare import same_values
from common.paged import ceil_div
from gen_data_quest_prefill_metadata import gen_data_quest_prefill_metadata
from ref_quest_prefill_metadata import quest_prefill_metadata_ref

NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 128, 128


def run_case(bench: Benchmark, batch: int, kv_blocks: int, dtype: torch.dtype) -> None:
    """Measure prefills of ``batch`` requests of ``kv_blocks`` whole KV blocks each."""
    metadata_blocks = ceil_div(kv_blocks, BLOCK_SIZE)
    # Rows behind the last one of a request are written too.
    block = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    bytes_per_call = batch * (kv_blocks + 2 * metadata_blocks) * block
    rotations = bench.rotations(bytes_per_call)
    inputs = gen_data_quest_prefill_metadata(
        [kv_blocks * BLOCK_SIZE] * (batch * rotations),
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        spare_columns=0,
        values="tiled",
        layout="dense",
        device=bench.device,
    )
    calls = [inputs.requests(r * batch, (r + 1) * batch).arguments()[0] for r in range(rotations)]
    pools = (inputs.maxblocks, inputs.minblocks)

    def check() -> None:
        select_attn_ops.quest_prefill_metadata(*calls[0])
        for pool, expected in zip(pools, quest_prefill_metadata_ref(*calls[0]), strict=True):
            assert bool(same_values(pool, expected).all())

    bench.case(
        "quest_prefill_metadata",
        f"B={batch} N={NUM_KV_HEADS} D={HEAD_DIM} blocks={kv_blocks}x{BLOCK_SIZE}",
        dtype,
        lambda r: select_attn_ops.quest_prefill_metadata(*calls[r]),
        lambda r: quest_prefill_metadata_ref(*calls[r], dtype=torch.float32),
        [
            (
                part_of(inputs.k_cache, r, batch * kv_blocks),
                *(part_of(pool, r, batch * metadata_blocks) for pool in pools),
            )
            for r in range(rotations)
        ],
        bytes_per_call,
        check,
    )


def main() -> None:
    bench = Benchmark(__doc__)
    shapes = itertools.product((10, 20, 24, 32), (63, 128, 256))
    for dtype in bench.dtypes:
        for batch, kv_blocks in [(10, 63)] if bench.quick else list(shapes):
            run_case(bench, batch, kv_blocks, dtype)


if __name__ == "__main__":
    main()

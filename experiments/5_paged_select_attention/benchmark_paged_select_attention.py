"""Time and bandwidth of paged_select_attention over selections of the usual size."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common.bench import Benchmark
from common.compare import assert_attention_matches
from common.paged import tiled_normal
from gen_data_paged_select_attention import AttentionInputs
from ref_paged_select_attention import paged_select_attention_ref
from select_attn_ops import paged_select_attention

NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 128, 128


def make_inputs(
    bench: Benchmark, batch: int, group: int, k: int, dtype: torch.dtype
) -> AttentionInputs:
    """Make requests in which every KV head has selected other blocks, heads outside tokens."""
    generator = torch.Generator().manual_seed(0)
    blocks = NUM_KV_HEADS * k
    shape = (batch * blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    order = torch.randperm(batch * blocks, generator=generator).int().view(batch, blocks)
    selected = torch.stack(
        [torch.randperm(blocks, generator=generator).int() for _ in range(batch)]
    )
    return AttentionInputs(
        torch.randn(batch, NUM_KV_HEADS * group, HEAD_DIM, generator=generator).to(dtype),
        tiled_normal(shape, dtype, generator).transpose(1, 2),
        tiled_normal(shape, dtype, generator).transpose(1, 2),
        order,
        torch.full((batch,), blocks * BLOCK_SIZE, dtype=torch.int32),
        selected.view(batch, NUM_KV_HEADS, k),
    ).map(lambda tensor: tensor.to(bench.device))


def run_case(bench: Benchmark, batch: int, group: int, k: int, dtype: torch.dtype) -> None:
    """Measure ``batch`` requests of ``k`` selected blocks."""
    rows = 2 * batch * NUM_KV_HEADS * k * BLOCK_SIZE + 2 * batch * NUM_KV_HEADS * group
    bytes_per_call = rows * HEAD_DIM * dtype.itemsize
    rotations = bench.rotations(bytes_per_call)
    inputs = make_inputs(bench, batch * rotations, group, k, dtype)
    calls = [inputs.requests(r * batch, (r + 1) * batch) for r in range(rotations)]
    out = torch.empty_like(calls[0].query)
    lse = torch.empty(out.shape[:2], device=bench.device)

    def check() -> None:
        paged_select_attention(*calls[0].positional, out=out, lse=lse)
        reference = paged_select_attention_ref(*calls[0].map(torch.Tensor.cpu).positional)
        assert_attention_matches(out, lse, reference)

    # As much as a call reads, in pieces of the same size: one head of as many blocks.
    blocks = batch * NUM_KV_HEADS * k
    heads = f"H={NUM_KV_HEADS * group} N={NUM_KV_HEADS}"
    bench.case(
        "paged_select_attention",
        f"B={batch} {heads} D={HEAD_DIM} block={BLOCK_SIZE} k={k}",
        dtype,
        lambda r: paged_select_attention(*calls[r].positional, out=out),
        lambda r: paged_select_attention_ref(
            *calls[r].positional, dtype=torch.float32, error_bounds=False
        ),
        [
            [pool[r * blocks : (r + 1) * blocks, :, 0] for pool in (inputs.k_cache, inputs.v_cache)]
            for r in range(rotations)
        ],
        bytes_per_call,
        check,
    )


if __name__ == "__main__":
    bench = Benchmark(__doc__)
    shapes = [(batch, group, k) for group in (1, 4, 7) for batch, k in ((1, 16), (8, 16), (8, 64))]
    for dtype in bench.dtypes:
        for case in [(1, 4, 16), (2, 4, 16)] if bench.quick else shapes:
            run_case(bench, *case, dtype)

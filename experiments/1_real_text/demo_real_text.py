"""Decode steps over real text: what they take, dense and sparse, and how much attention is kept."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attention_mass
import torch
from common.devices import DEVICE_HELP, device_or_exit, seconds
from gen_data_real_text import BLOCK_SIZE, RealTextData, gen_data_real_text
from plot_real_text import plot_real_text
from select_attn_ops import quest_block_select_paged, quest_prefill_metadata
from select_attn_ops.recall import measures
from text_features import TextTooShortError, default_text
from whole_step import StepResult, measure_steps

BUDGETS = (8, 16, 32, 64)
# One decode step of Qwen3-8B selects once per layer, each time from other metadata.
NUM_LAYERS = 36
MIB = 2**20


@dataclass
class BudgetResult:
    """What was measured with one budget of ``k`` blocks; masses are ``[num_steps, num_kv_heads]``.

    Seconds are medians of one call. "batch" is all steps in one call, "step" the last one alone.
    """

    k: int
    blocks: torch.Tensor
    selected: torch.Tensor
    best: torch.Tensor
    recent: torch.Tensor
    random: torch.Tensor
    batch_seconds: float
    batch_bytes: int  # of metadata
    step_seconds: float
    step_bytes: int  # of metadata
    read_bytes: int  # of metadata, and of K and V in the selected blocks, at the last step
    read_share: float  # of K and V in all blocks


@dataclass
class DemoResult:
    """All that the table and the picture show."""

    data: RealTextData
    mass: torch.Tensor  # [num_steps, num_kv_heads, num_blocks]
    metadata_seconds: float
    kv_bytes: int  # K and V of the whole context at the last step
    budgets: list[BudgetResult]
    exact_out: torch.Tensor  # [num_steps, num_heads, head_dim]
    steps: list[StepResult]


class Progress:
    """One line per stage, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self, message: str) -> None:
        print(f"[{time.perf_counter() - self._start:5.1f} s] {message}", flush=True)


def _median_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median time of the calls, each timed once, after an untimed round of all of them."""
    for call in calls:
        call()
    return statistics.median(seconds(call, device) for call in calls)


def _build_metadata(data: RealTextData) -> float:
    """Fill the metadata for the whole text; what a step must not see yet lies in its window."""
    length = torch.tensor([data.num_tokens], dtype=torch.int32, device=data.query.device)

    def build() -> None:
        quest_prefill_metadata(
            data.k_cache,
            data.block_tables[:1],
            length,
            data.metadata_block_tables[:1],
            data.maxblocks,
            data.minblocks,
        )

    return _median_seconds([build] * 3, data.query.device)


def _row_bytes(data: RealTextData) -> int:
    """Bytes of one token's keys, and of one block's maxima."""
    num_kv_heads, head_dim = data.k_cache.shape[2:]
    return num_kv_heads * head_dim * data.k_cache.element_size()


def _metadata_bytes(data: RealTextData, steps: slice) -> int:
    """Bytes of the rows that are scored: all but the sink's and the window's, max and min."""
    full_blocks = data.metadata_seq_lens[steps].long() // BLOCK_SIZE
    return 2 * int((full_blocks - 1).clamp(min=0).sum()) * _row_bytes(data)


def _kv_bytes(data: RealTextData) -> int:
    """Bytes of K and V of the whole context at the last step."""
    return 2 * int(data.seq_lens[-1]) * _row_bytes(data)


def _selected_kv_bytes(data: RealTextData, blocks: torch.Tensor) -> int:
    """Bytes of K and V in the blocks ``[num_kv_heads, k]`` selected at the last step."""
    blocks = blocks[blocks >= 0]
    tokens = (int(data.seq_lens[-1]) - blocks * BLOCK_SIZE).clamp(max=BLOCK_SIZE)
    return 2 * int(tokens.sum()) * data.k_cache.shape[3] * data.k_cache.element_size()


def _measure_budget(
    data: RealTextData,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mass: torch.Tensor,
    k: int,
    generator: torch.Generator,
) -> BudgetResult:
    num_kv_heads = mass.shape[1]
    device = data.query.device

    def selecting(
        steps: slice, maxblocks: torch.Tensor, minblocks: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        query = data.query[steps]
        tables = data.metadata_block_tables[steps]
        seq_lens = data.seq_lens[steps]
        metadata_seq_lens = data.metadata_seq_lens[steps]
        out = torch.empty(len(query), num_kv_heads, k, dtype=torch.int32, device=device)

        def select() -> torch.Tensor:
            return quest_block_select_paged(
                query,
                maxblocks,
                minblocks,
                tables,
                seq_lens,
                metadata_seq_lens=metadata_seq_lens,
                out=out,
            )

        return out, select

    every, last = slice(None), slice(-1, None)
    blocks, select = selecting(every, data.maxblocks, data.minblocks)
    batch_seconds = _median_seconds([select] * 5, device)
    layer_calls = [selecting(last, *layer)[1] for layer in layers]
    step_seconds = _median_seconds(layer_calls * 3, device)

    num_blocks = -(-data.seq_lens // BLOCK_SIZE)
    step_bytes = _metadata_bytes(data, last)
    read_bytes = step_bytes + _selected_kv_bytes(data, blocks[-1])
    return BudgetResult(
        k=k,
        blocks=blocks,
        selected=measures.held(mass, blocks),
        best=measures.held(mass, measures.best_blocks(mass, k)),
        recent=measures.held(mass, measures.recent_blocks(num_blocks, num_kv_heads, k)),
        random=measures.held(mass, measures.random_blocks(num_blocks, num_kv_heads, k, generator)),
        batch_seconds=batch_seconds,
        batch_bytes=_metadata_bytes(data, every),
        step_seconds=step_seconds,
        step_bytes=step_bytes,
        read_bytes=read_bytes,
        read_share=read_bytes / _kv_bytes(data),
    )


def measure(
    text: Path,
    num_tokens: int,
    num_steps: int,
    seed: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda message: None,
) -> DemoResult:
    """Build the cache and its metadata, select with every budget, compare with exact attention."""
    data = gen_data_real_text(text, num_tokens, num_steps, seed, device, progress)
    progress("metadata: maximum and minimum of the keys of every block")
    metadata_seconds = _build_metadata(data)
    layers = [(data.maxblocks.clone(), data.minblocks.clone()) for _ in range(NUM_LAYERS)]
    mass, exact_out = attention_mass.exact_attention(data, progress)
    generator = torch.Generator().manual_seed(seed)
    budgets = []
    for k in BUDGETS:
        progress(f"selecting {k} blocks at each of {num_steps} positions")
        budgets.append(_measure_budget(data, layers, mass, k, generator))
    progress("whole decode steps, dense and sparse")
    steps = measure_steps(data, BUDGETS, exact_out)
    return DemoResult(data, mass, metadata_seconds, _kv_bytes(data), budgets, exact_out, steps)


def print_table(result: DemoResult) -> None:
    """Print what was measured, one line per budget."""
    data = result.data
    num_steps, num_kv_heads, num_blocks = result.mass.shape
    row_bytes = _row_bytes(data)
    key_bytes = data.num_tokens * row_bytes
    metadata_bytes = 2 * num_blocks * row_bytes
    last_len = int(data.seq_lens[-1])
    print(f"""
Context   {data.num_tokens:,} tokens, {num_blocks:,} KV blocks of {BLOCK_SIZE}; \
{data.query.shape[1]} query heads, {num_kv_heads} KV heads, head_dim {data.query.shape[2]}, \
{str(data.k_cache.dtype).removeprefix("torch.")}
Metadata  {metadata_bytes / MIB:.2f} MiB for {key_bytes / MIB:.1f} MiB of keys, \
built in {result.metadata_seconds * 1e3:.1f} ms \
({key_bytes / result.metadata_seconds / 1e9:.1f} GB/s of keys)

Share of the exact attention mass that k blocks hold: mean of {num_steps} decode steps in the second
half of the text, and of all KV heads. The k selected blocks include the sink and the window.

     k    selected    best possible    most recent    random""")
    for budget in result.budgets:
        print(
            f"{budget.k:6}{budget.selected.mean():12.3f}{budget.best.mean():17.3f}"
            f"{budget.recent.mean():15.3f}{budget.random.mean():10.3f}"
        )
    print(f"""
Cost of quest_block_select_paged: median time, GB/s of the metadata that it has to read.
One step is at {last_len:,} tokens, timed over the metadata of {NUM_LAYERS} layers in turn. It reads
the metadata and k blocks of K and V, and avoids the rest of their {result.kv_bytes / MIB:.1f} MiB.
{num_steps} steps in one call share one context, whose metadata stays in the processor's caches.

     k    one step    GB/s    MiB read    MiB avoided    {num_steps:5} steps    GB/s""")
    for budget in result.budgets:
        print(
            f"{budget.k:6}{budget.step_seconds * 1e6:9.1f} us"
            f"{budget.step_bytes / budget.step_seconds / 1e9:8.1f}"
            f"{budget.read_bytes / MIB:12.2f}"
            f"{(result.kv_bytes - budget.read_bytes) / MIB:15.2f}"
            f"{budget.batch_seconds * 1e3:12.2f} ms"
            f"{budget.batch_bytes / budget.batch_seconds / 1e9:8.1f}"
        )
    by_torch, dense = result.steps[:2]
    print(f"""
One whole decode step at {last_len:,} tokens: update the metadata, select, attend (QuestDecoder).
Dense steps attend to every block: by the same operator, and by torch over K and V in one piece.
Error: length of the difference to exact attention over the length of that, mean of all rows.

attention to            one step    dense over it    torch over it    output error""")
    for step in result.steps:
        print(
            f"{step.name:20}{step.seconds * 1e3:9.2f} ms"
            f"{dense.seconds / step.seconds:15.1f} x"
            f"{by_torch.seconds / step.seconds:15.1f} x"
            f"{step.error:16.4f}"
        )


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least:,}, got {value:,}")
        return value

    return parse


def main(argv: Sequence[str] | None = None) -> DemoResult:
    """Run the demo; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text",
        type=Path,
        default=default_text(),
        metavar="PATH",
        help="file, or folder of text files (default: the Python standard library)",
    )
    parser.add_argument(
        "--tokens", type=_at_least(1024), default=131_072, help="context length (default: 131072)"
    )
    parser.add_argument(
        "--positions", type=_at_least(1), default=256, help="decode steps (default: 256)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_real_text.png"),
        metavar="PICTURE.png",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="order of a folder's files, positions, rotations, tables, random blocks (default: 0)",
    )
    parser.add_argument("--device", default="cpu", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    if args.positions > args.tokens // 2:
        parser.error(f"--positions must be at most half of --tokens, got {args.positions:,}")

    device = device_or_exit(args.device)
    progress = Progress()
    try:
        result = measure(args.text, args.tokens, args.positions, args.seed, device, progress)
    except (TextTooShortError, OSError) as error:
        sys.exit(f"error: {error}")
    progress("done")
    print_table(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot_real_text(
        result.mass, result.data.seq_lens, BLOCK_SIZE, result.budgets, result.steps, args.output
    )
    print(f"\nPicture: {args.output}")
    return result


if __name__ == "__main__":
    main()

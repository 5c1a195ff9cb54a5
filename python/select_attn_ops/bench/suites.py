"""Which cases a run has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .cases import ATTEND, PREFILL, SELECT, TABLES, Shape, Spec

_K, _M = 1 << 10, 1 << 20

# KV blocks that tables have room for on a GPU, where a launch must not depend on lengths.
TABLE_BLOCKS = 8192
_WIDE = Shape(SELECT, (_M,), table_blocks=TABLE_BLOCKS)

# 64 MiB of selected keys and values in bfloat16; every KV head has blocks of its own.
_ATTENTION = Shape(ATTEND, (16 * _K,) * 8, rows=1)

# The requests of a batch of which one is 100 times as long as the others.
_ONE_LONG = (100, *[1] * 99)


def _lengths(tokens: int, factors: Iterable[int]) -> tuple[int, ...]:
    return tuple(tokens * factor for factor in factors)


def _speed() -> list[Spec]:
    """The lines of the table of speed that are shares of the ceiling."""
    select = Shape(SELECT, (64 * _K,) * 32)  # 64 MiB of metadata
    prefill = Shape(PREFILL, (16 * _K,) * 4)
    specs = [
        Spec(shape, dtype, threads, compiled=True, label=label)
        for label, shape in (("line 1", select), ("line 2", prefill))
        for dtype in ("fp16", "bf16")
        for threads in (1, None)
    ]
    one_head = Shape(SELECT, (_M,), num_heads=4, num_kv_heads=1, block_size=16)
    ragged = Shape(SELECT, _lengths(16 * _K, _ONE_LONG))
    ragged_keys = Shape(PREFILL, _lengths(_K, _ONE_LONG), rows=1)
    strided = Shape(PREFILL, (16 * _K,) * 4, block_size=16, layout="half_of_last")
    specs += [
        Spec(one_head, label="line 3", compiled=True),
        Spec(replace(one_head, operator=PREFILL), label="line 3"),
        Spec(ragged, label="line 4", compiled=True),
        Spec(ragged_keys, label="line 4"),
        Spec(strided, threads=1, label="line 5"),
        Spec(strided, label="line 5", compiled=True),
        Spec(select, simd_target="AVX2", label="line 10"),
        Spec(prefill, simd_target="AVX2", label="line 10"),
        Spec(_ATTENTION, label="line 11"),
        Spec(replace(_ATTENTION, layout="heads_outside"), label="line 11", compiled=True),
    ]
    return specs


def _original() -> list[Spec]:
    """The shapes of the original's benchmarks; all of them are in the experiments."""
    shapes = []
    for batch in (10, 20, 24, 32):
        for metadata_blocks in (1, 2, 4, 6):
            shape = Shape(SELECT, (metadata_blocks * 16 * _K,) * batch)
            shapes.append(shape)
            if metadata_blocks == 4:
                shapes.append(replace(shape, tokens_since_metadata_update=64))
    shapes += [Shape(PREFILL, (16 * _K,) * batch) for batch in (10, 20)]
    return [Spec(shape, label="original") for shape in shapes]


def _shapes() -> list[Spec]:
    """What engines may come with."""
    select, prefill = Shape(SELECT, (32 * _K,) * 16), Shape(PREFILL, (16 * _K,) * 4)
    shapes: list[tuple[str, Shape]] = []

    def add(label: str, *more: Shape) -> None:
        shapes.extend((label, shape) for shape in more)

    long = Shape(SELECT, (128 * _K,))
    add("one long request", long, replace(long, seq_lens=(_M,)))
    add("one long request", replace(long, operator=PREFILL))
    short = Shape(SELECT, (2 * _K,) * 512, rows=16)
    add("many short requests", short)
    add("many short requests", Shape(PREFILL, (512,) * 256, rows=1))
    add("ragged batch", replace(short, seq_lens=_lengths(2 * _K, range(1, 65))))
    add("ragged batch", Shape(PREFILL, _lengths(_K, range(1, 33)), rows=8))
    for block_size in (16, 64):
        # As many rows of metadata as with blocks of 128.
        lengths = (block_size * 256,) * 16
        add("block size", Shape(SELECT, lengths, block_size=block_size))
        add("block size", replace(prefill, block_size=block_size))
    for head_dim in (64, 256):
        add("head dim", replace(select, head_dim=head_dim), replace(prefill, head_dim=head_dim))
    for shape in (select, prefill):
        add("heads outside", replace(shape, layout="heads_outside"))
        add("a row per KV block", replace(shape, rows=1))
    add("values beside keys", replace(select, layout="half_of_last"))
    add("values beside keys", replace(prefill, layout="half_of_last"))
    scattered = Shape(SELECT, (_M,), num_heads=4, num_kv_heads=1, block_size=16, places_per_block=8)
    add("scattered blocks", scattered, replace(scattered, seq_lens=(64 * _K,) * 16))
    add("scattered blocks", replace(scattered, operator=PREFILL, seq_lens=(_M,)))
    add("tables", Shape(TABLES, (128 * _K,) * 256, k=64))
    add("values beside keys", replace(_ATTENTION, layout="half_of_last"))
    for group in (1, 7, 16):
        add("group size", replace(_ATTENTION, num_heads=group * 8, layout="heads_outside"))
    for head_dim in (64, 80, 256):
        add("head dim", replace(_ATTENTION, head_dim=head_dim, layout="heads_outside"))
    add("block size", replace(_ATTENTION, block_size=16, k=128))
    add("one request", replace(_ATTENTION, seq_lens=(128 * _K,), k=128))
    specs = [Spec(replace(_ATTENTION, layout="heads_outside"), "fp16", label="float16")]
    specs += [Spec(shape, label=label) for label, shape in shapes]
    specs += [Spec(shape, "fp32", label="float32") for shape in (select, prefill, _ATTENTION)]
    return specs


def _context() -> list[Spec]:
    """One request of 8k to 1M tokens: what ``--plot`` draws."""
    lengths = [8 * _K << i for i in range(8)]
    return [
        Spec(Shape(operator, (length,), num_heads=8, num_kv_heads=2, rows=64), label="context")
        for operator in (SELECT, PREFILL)
        for length in lengths
    ]


def _gpu() -> list[Spec]:
    """The lines of the table of speed of a GPU."""
    long = replace(_WIDE, seq_lens=(128 * _K,))
    longer = replace(_WIDE, seq_lens=(_M,), k=64)
    lines = [
        ("gpu 1", replace(_WIDE, seq_lens=(64 * _K,) * 32)),  # 64 MiB
        ("gpu 1", replace(_WIDE, seq_lens=(_M,) * 8)),  # 256 MiB
        ("gpu 2", replace(_WIDE, operator=PREFILL, seq_lens=(16 * _K,) * 8)),  # 256 MiB
        ("gpu 2", replace(_WIDE, operator=PREFILL, seq_lens=(16 * _K,) * 32)),  # 1 GiB
        # Metadata blocks of a row have tables with an entry for every KV block.
        *(("gpu 3", replace(long, rows=rows)) for rows in (None, 1)),
        *(("gpu 5", replace(longer, rows=rows)) for rows in (None, 1)),
        (
            "gpu 6",
            replace(_WIDE, operator=PREFILL, seq_lens=(16 * _K,) * 32, updated_blocks=1),
        ),
    ]
    specs = [Spec(shape, label=label, compiled=True) for label, shape in lines]
    for label, shape in lines:
        if label == "gpu 3":
            specs.append(Spec(shape, label="gpu 4", warm=True, compiled=True))
        elif label in ("gpu 5", "gpu 6"):
            specs.append(Spec(shape, label="warm", warm=True, compiled=True))
        else:
            specs.append(Spec(shape, "fp16", label=label))
    return specs


SUITES = {
    "speed": _speed,
    "original": _original,
    "shapes": _shapes,
    "context": _context,
    "gpu": _gpu,
}


def on_cuda(specs: Iterable[Spec]) -> list[Spec]:
    """What there is to measure of them on a CUDA device, with tables as wide as an engine's."""
    changed = []
    for spec in specs:
        if spec.shape.operator == ATTEND:  # the backend does not have it
            continue
        shape = replace(spec.shape, table_blocks=TABLE_BLOCKS)
        # The lines of the table of speed that are the CPU's have other targets.
        label = "speed" if spec.label.startswith("line ") else spec.label
        changed.append(
            replace(spec, shape=shape, label=label, threads=None, simd_target=None, compiled=True)
        )
    return list(dict.fromkeys(changed))


def quick(specs: list[Spec]) -> list[Spec]:
    """Small stand-ins of a few cases of each kind, to see that all of it works."""
    kept: dict[tuple[str, str], Spec] = {}
    for spec in specs:
        kept.setdefault((spec.label, spec.shape.operator), spec)
    small = []
    for spec in kept.values():
        s = spec.shape
        tokens = s.tokens_per_metadata_block
        lengths = tuple(
            max(min(length, 4 * _K) // tokens, 1) * tokens for length in sorted(s.seq_lens)[-2:]
        )
        shape = replace(s, seq_lens=lengths, num_heads=8, num_kv_heads=min(s.num_kv_heads, 2))
        small.append(replace(spec, shape=replace(shape, k=min(s.k, 8)), compiled=False))
    return small

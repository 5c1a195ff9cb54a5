"""What is measured: shapes, their data, the calls, and a check of what the calls return."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import (
    paged_select_attention,
    quest_block_select_paged,
    quest_block_select_paged_workspace_size,
    quest_prefill_metadata,
    selected_block_tables,
)
from . import alternatives
from .measuring import total_memory_bytes
from .spans import touched_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_SETS = 1024
# A last cache that is larger, beside sets that are as small.
MAX_SETS_CUDA = 4096

SELECT = "quest_block_select_paged"
PREFILL = "quest_prefill_metadata"
TABLES = "selected_block_tables"
ATTEND = "paged_select_attention"


# By no operator, out of normal numbers.
_NEVER_WRITTEN = 30000.0


class WrongResultError(AssertionError):
    """An operator's result is not the reference's: its speed is of no interest."""


@dataclass(frozen=True)
class Shape:
    """One shape of one operator.

    The lengths fill the metadata blocks, so that all of a block is read.
    """

    operator: str
    seq_lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 128
    rows: int | None = None
    """Rows per metadata block; None for as many as a KV block has tokens."""
    k: int = 16
    layout: str = "rows"
    """``"rows"``; ``"heads_outside"``: heads outside tokens and rows; ``"half_of_last"``: keys in
    the first half of rows that values share."""
    tokens_since_metadata_update: int = -1
    places_per_block: int = 1
    """Blocks that the pools have for each that is in use."""
    updated_blocks: int = 0
    """KV blocks at the end of each request whose metadata is written; 0 for all."""
    table_blocks: int = 0
    """KV blocks that tables have room for, if those of the longest request are fewer."""

    def __post_init__(self) -> None:
        assert all(length % self.tokens_per_metadata_block == 0 for length in self.seq_lens)

    @property
    def rows_per_metadata_block(self) -> int:
        return self.rows or self.block_size

    @property
    def tokens_per_metadata_block(self) -> int:
        return self.rows_per_metadata_block * self.block_size

    @property
    def pool_bytes_per_byte(self) -> int:
        """What the pools have for each byte that is in use."""
        return self.places_per_block * (2 if self.layout == "half_of_last" else 1)

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def num_blocks(self) -> list[int]:
        """KV blocks of each request."""
        return [length // self.block_size for length in self.seq_lens]

    @property
    def lengths(self) -> str:
        """The lengths, in short."""
        shortest, longest = min(self.seq_lens), max(self.seq_lens)
        if shortest == longest:
            return tokens_text(longest)
        return f"{tokens_text(shortest)}..{tokens_text(longest)}"

    def __str__(self) -> str:
        parts = [f"B={self.batch}"]
        if self.operator in (SELECT, ATTEND):
            parts.append(f"H={self.num_heads}")
        parts.append(f"N={self.num_kv_heads}")
        if self.operator != TABLES:
            parts.append(f"D={self.head_dim}")
        parts += [f"tokens={self.lengths}", f"block={self.block_size}"]
        if self.operator in (SELECT, PREFILL):
            parts.append(f"R={self.rows_per_metadata_block}")
        if self.operator != PREFILL:
            parts.append(f"k={self.k}")
        if self.tokens_since_metadata_update >= 0:
            parts.append(f"t={self.tokens_since_metadata_update}")
        if self.layout != "rows":
            parts.append(self.layout)
        if self.places_per_block != 1:
            parts.append(f"pool={self.places_per_block}x")
        if self.updated_blocks:
            parts.append(f"updated={self.updated_blocks}")
        if self.table_blocks:
            parts.append(f"width={self.table_blocks}")
        return " ".join(parts)


def tokens_text(tokens: int) -> str:
    """A length as people say it: 8k, 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


@dataclass(frozen=True)
class Spec:
    """A shape and how to run it."""

    shape: Shape
    dtype: str = "bf16"
    threads: int | None = None
    """None for as many as there are."""
    simd_target: str | None = None
    compiled: bool = False
    """Whether torch.compile, which takes seconds, takes part."""
    warm: bool = False
    """Whether all calls have the same inputs, which caches may hold, and none are rotated."""
    label: str = ""
    """What the case answers."""

    @property
    def name(self) -> str:
        """What ``--filter`` looks at."""
        parts = [f"{self.label}:", self.shape.operator, str(self.shape), self.dtype]
        if self.threads is not None:
            parts.append(f"threads={self.threads}")
        if self.warm:
            parts.append("warm")
        return " ".join([*parts, self.simd_target or ""]).strip()


@dataclass(frozen=True)
class Case:
    """Something to be measured, with its data, in several sets that are rotated."""

    operator: str
    shape: str
    dtype: str
    calls: Sequence[Callable[[], object]]
    """Per set, the operator's call."""
    touched: Sequence[Sequence[torch.Tensor]]
    """Per set, the tensors whose bytes are the work, at most three."""
    bytes_per_call: int
    """What must be read and written, whole cache lines counted."""
    alternatives: Callable[[bool], Mapping[str, Callable[[], Sequence[Callable[[], object]]]]]
    """By name, what makes the calls of an alternative; argument: compiled ones too."""
    check: Callable[[], None]
    """Runs the operator once; raises `WrongResultError`."""
    label: str = ""

    @functools.cached_property
    def touched_bytes(self) -> int:
        """Bytes of the cache lines that the touched tensors of one set lie on."""
        return sum(touched_bytes(tensor) for tensor in self.touched[0])


def _noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, shift: float = 0
) -> torch.Tensor:
    """Normal numbers, repeated: quick to make, and no two pages of the same physical memory."""
    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape)
    # An odd length, so that no two rows of a power of two are alike.
    tile = (torch.randn(min(count, 1_000_003), generator=generator) + shift).to(dtype).to(device)
    noise = torch.empty(count, dtype=dtype, device=device)
    for start in range(0, count, len(tile)):
        part = noise[start : start + len(tile)]
        part.copy_(tile[: len(part)])
    return noise.view(*shape)


def _pool(
    blocks: int, rows: int, shape: Shape, dtype: torch.dtype, device: torch.device, shift: float = 0
) -> torch.Tensor:
    """``[blocks, rows, N, D]`` in the layout of the shape."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    if shape.layout == "rows":
        return _noise((blocks, rows, heads, dim), dtype, device, shift)
    if shape.layout == "heads_outside":
        return _noise((blocks, heads, rows, dim), dtype, device, shift).transpose(1, 2)
    return _noise((blocks, rows, heads, 2 * dim), dtype, device, shift)[..., :dim]


def _tables(
    counts: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
    places_per_block: int = 1,
    before: Sequence[int] | None = None,
    width: int = 0,
) -> torch.Tensor:
    """Tables that give every request `counts` blocks of a pool, shuffled; 0 around them.

    There are `before` entries before them, and `width` in all or as many as needed.
    """
    before = before or [0] * len(counts)
    ends = [first + count for first, count in zip(before, counts, strict=True)]
    order = torch.randperm(sum(counts), generator=generator).int() * places_per_block
    tables = torch.zeros(len(counts), max(width, *ends), dtype=torch.int32)
    start = 0
    for row, first, end in zip(tables, before, ends, strict=True):
        row[first:end] = order[start : start + end - first]
        start += end - first
    return tables.to(device)


def _set_count(
    bytes_per_set: int, rotated_bytes: int, device: torch.device, pool_bytes_per_byte: int = 1
) -> int:
    if bytes_per_set > 4 * rotated_bytes:  # no cache holds much of it from one turn to the next
        return 1
    most = MAX_SETS_CUDA
    if device.type != "cuda":
        # The alternatives may hold copies of the pools.
        most = min(MAX_SETS, total_memory_bytes() // (4 * bytes_per_set * pool_bytes_per_byte))
    return max(2, min(most, -(-rotated_bytes // bytes_per_set)))


def _numbers(counts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For every block of every request, the request and the number of the block in it."""
    request = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    number = torch.cat([torch.arange(count) for count in counts])
    return request.to(device), number.to(device)


def build(spec: Spec, device: torch.device, rotated_bytes: int) -> Case:
    """Make the data of a case: sets of inputs of `rotated_bytes` or so in all; 0 for one set."""
    builders = {
        SELECT: _build_select,
        PREFILL: _build_prefill,
        TABLES: _build_tables,
        ATTEND: _build_attend,
    }
    return builders[spec.shape.operator](spec, device, rotated_bytes)


def _case(
    spec: Spec,
    calls: Sequence[Callable[[], object]],
    touched: Sequence[Sequence[torch.Tensor]],
    bytes_per_call: int,
    problems: Sequence[Any],
    check: Callable[[], None],
    device: torch.device,
) -> Case:
    def prepared(compiled: bool) -> dict[str, Callable[[], Sequence[Callable[[], object]]]]:
        ways = alternatives.alternatives(compiled, device)
        return {name: functools.partial(prepare, problems) for name, prepare in ways.items()}

    return Case(
        operator=spec.shape.operator,
        shape=str(spec.shape) + " warm" * spec.warm,
        dtype="int32" if spec.shape.operator == TABLES else spec.dtype,
        calls=calls,
        touched=touched,
        bytes_per_call=bytes_per_call,
        alternatives=prepared,
        check=check,
        label=spec.label,
    )


def _build_select(spec: Spec, device: torch.device, rotated_bytes: int) -> Case:
    s, dtype = spec.shape, DTYPES[spec.dtype]
    rows = s.rows_per_metadata_block
    blocks = [count // rows for count in s.num_blocks]
    row_bytes = s.num_kv_heads * s.head_dim * dtype.itemsize
    places = s.places_per_block
    sets = _set_count(
        2 * sum(s.num_blocks) * row_bytes, rotated_bytes, device, s.pool_bytes_per_byte
    )
    maxima = _pool(sets * sum(blocks) * places, rows, s, dtype, device)
    minima = _pool(sets * sum(blocks) * places, rows, s, dtype, device, shift=-4)
    generator = torch.Generator().manual_seed(1)
    seq_lens = torch.tensor(s.seq_lens, dtype=torch.int32, device=device)
    out = torch.empty(s.batch, s.num_kv_heads, s.k, dtype=torch.int32, device=device)
    since = s.tokens_since_metadata_update
    options: dict[str, Any] = {
        "block_size": s.block_size,
        "tokens_since_metadata_update": since,
        "out": out,
    }

    scored, forced = sum(s.num_blocks), None
    if since >= 0:
        window = -(-since // s.block_size)
        scored -= s.batch * (window + 1)
        numbers = torch.arange(max(s.num_blocks), device=device)[None]
        ends = torch.tensor(s.num_blocks, device=device)[:, None]
        forced = (numbers == 0) | ((numbers >= ends - window) & (numbers < ends))
    calls, touched, problems = [], [], []
    workspace: torch.Tensor | None = None
    for part_max, part_min in zip(maxima.chunk(sets), minima.chunk(sets), strict=True):
        query = _noise((s.batch, s.num_heads, s.head_dim), dtype, device)
        wide = _tables(blocks, generator, device, places, width=-(-s.table_blocks // rows))
        tables = wide[:, : max(blocks)]
        arguments = (query, part_max, part_min, wide, seq_lens)
        if workspace is None:
            size = quest_block_select_paged_workspace_size(*arguments, out, block_size=s.block_size)
            workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        if len(workspace):
            options["workspace"] = workspace
        calls.append(functools.partial(quest_block_select_paged, *arguments, **options))
        touched.append((part_max[::places], part_min[::places]))
        per_row = None
        if len(set(s.seq_lens)) > 1:
            request, number = _numbers(s.num_blocks, device)
            block = tables[request, number // rows].long()
            per_row = (block, number % rows, request, number)
        problems.append(
            alternatives.SelectionProblem(
                query, part_max, part_min, tables, per_row, max(s.num_blocks), forced, s.k
            )
        )

    @functools.cache
    def scores() -> torch.Tensor:
        return alternatives.scores(problems[0])

    def check() -> None:
        out.fill_(-7)
        calls[0]()
        reference = scores()
        listed = min(s.k, min(s.num_blocks))
        selected = out[..., :listed].long()
        if int(selected.min()) < 0 or int(selected.max()) >= max(s.num_blocks):
            raise WrongResultError("a block that does not exist is selected")
        expected = reference.topk(listed).values
        got = reference.gather(2, selected).sort(-1, descending=True).values
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-3):
            raise WrongResultError("the selected blocks are not the best ones")
        ordered = selected.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise WrongResultError("a block is selected twice")

    bytes_per_call = 2 * scored * row_bytes + problems[0].query.nbytes + out.nbytes
    return _case(spec, calls, touched, bytes_per_call, problems, check, device)


def _build_prefill(spec: Spec, device: torch.device, rotated_bytes: int) -> Case:
    s, dtype = spec.shape, DTYPES[spec.dtype]
    rows = s.rows_per_metadata_block
    updated = [s.updated_blocks or count for count in s.num_blocks]
    right = [count - new for count, new in zip(s.num_blocks, updated, strict=True)]
    kv_blocks = sum(updated)
    metadata_blocks = [count // rows for count in s.num_blocks]
    row_bytes = s.num_kv_heads * s.head_dim * dtype.itemsize
    places = s.places_per_block
    bytes_per_set = kv_blocks * (s.block_size + 2) * row_bytes
    sets = _set_count(bytes_per_set, rotated_bytes, device, s.pool_bytes_per_byte)
    keys = _pool(sets * kv_blocks * places, s.block_size, s, dtype, device)
    maxima = _pool(sets * sum(metadata_blocks) * places, rows, s, dtype, device)
    minima = _pool(sets * sum(metadata_blocks) * places, rows, s, dtype, device)
    generator = torch.Generator().manual_seed(1)
    seq_lens = torch.tensor(s.seq_lens, dtype=torch.int32, device=device)
    request, number = _numbers(updated, device)
    number += torch.tensor(right, device=device)[request]
    options: dict[str, Any] = {}
    if s.updated_blocks:
        tokens = [count * s.block_size for count in right]
        options["metadata_seq_lens"] = torch.tensor(tokens, dtype=torch.int32, device=device)
    calls, problems = [], []
    touched: list[tuple[torch.Tensor, ...]] = []
    for part, part_max, part_min in zip(
        keys.chunk(sets), maxima.chunk(sets), minima.chunk(sets), strict=True
    ):
        tables = _tables(updated, generator, device, places, right, s.table_blocks)
        width = -(-s.table_blocks // rows)
        metadata_tables = _tables(metadata_blocks, generator, device, places, width=width)
        arguments = (part, tables, seq_lens, metadata_tables, part_max, part_min)
        calls.append(functools.partial(quest_prefill_metadata, *arguments, **options))
        touched.append((part[::places], part_max[::places], part_min[::places]))
        if s.updated_blocks:  # the few rows that are written count, but are not read
            touched[-1] = touched[-1][:1]
        problems.append(
            alternatives.MetadataProblem(
                part,
                tables[request, number].long(),
                metadata_tables[request, number // rows].long(),
                number % rows,
                part_max,
                part_min,
            )
        )

    pools = (problems[0].maxblocks[::places], problems[0].minblocks[::places])

    @functools.cache
    def expected() -> list[torch.Tensor]:
        for pool in pools:
            pool.fill_(_NEVER_WRITTEN)
        alternatives.prefill_metadata(problems[0])
        return [pool.clone() for pool in pools]

    def check() -> None:
        references = expected()
        for pool in pools:
            pool.fill_(_NEVER_WRITTEN)
        calls[0]()
        for name, pool, reference in zip(
            ("maxblocks", "minblocks"), pools, references, strict=True
        ):
            if not torch.equal(pool, reference):
                raise WrongResultError(f"{name} are not what the reference writes")

    work = sum(map(touched_bytes, touched[0]))
    if s.updated_blocks:
        work += 2 * kv_blocks * row_bytes
    return _case(spec, calls, touched, work, problems, check, device)


def _build_tables(spec: Spec, device: torch.device, rotated_bytes: int) -> Case:
    s = spec.shape
    generator = torch.Generator().manual_seed(1)
    width = max(s.num_blocks)
    seq_lens = torch.tensor(s.seq_lens, dtype=torch.int32, device=device)
    size = (s.batch, s.num_kv_heads, s.k)
    sets = _set_count(4 * (2 * math.prod(size) + s.batch * width), rotated_bytes, device)
    tables_out = torch.empty(size, dtype=torch.int32, device=device)
    lens_out = torch.empty(size[:2], dtype=torch.int32, device=device)
    outputs: dict[str, Any] = {"out": tables_out, "lens_out": lens_out}
    calls, touched, problems = [], [], []
    for _ in range(sets):
        first = torch.randint(width, (*size[:2], 1), generator=generator)
        steps = torch.randperm(width, generator=generator)[: s.k]
        chosen = ((first + steps) % width).int().to(device)
        wide = _tables(s.num_blocks, generator, device, width=s.table_blocks)
        tables = wide[:, :width]
        calls.append(
            functools.partial(
                selected_block_tables, chosen, wide, seq_lens, block_size=s.block_size, **outputs
            )
        )
        touched.append((chosen, tables, tables_out))
        problems.append(alternatives.TablesProblem(chosen, tables, seq_lens, s.block_size))

    def check() -> None:
        calls[0]()
        expected = alternatives.block_tables(problems[0])
        for name, mine, reference in zip(
            ("tables", "lens"), (tables_out, lens_out), expected, strict=True
        ):
            if not torch.equal(mine, reference):
                raise WrongResultError(f"{name} are not the reference's")

    work = sum(map(touched_bytes, touched[0]))
    return _case(spec, calls, touched, work, problems, check, device)


def _selected_places(
    order: torch.Tensor, heads: int, k: int, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks for every KV head of every request, ``[B, N, k]``, and the requests' own tables.

    `order` are the requests' blocks in the pool, ``[B, blocks]``. Heads take other blocks as long
    as there are any, and with another `first` other ones again.
    """
    slots = (torch.arange(heads)[:, None] + first) * k + torch.arange(k)
    numbers = (slots % order.shape[1]).int()
    return numbers.expand(len(order), -1, -1).contiguous(), order.int()


def _build_attend(spec: Spec, device: torch.device, rotated_bytes: int) -> Case:
    s, dtype = spec.shape, DTYPES[spec.dtype]
    heads, blocks = s.num_kv_heads, s.num_blocks[0]
    assert len(set(s.seq_lens)) == 1, "requests of one length"
    if s.layout == "half_of_last":
        both = _noise((s.batch * blocks, s.block_size, heads, 2 * s.head_dim), dtype, device)
        keys, values = both[..., : s.head_dim], both[..., s.head_dim :]
    else:
        keys, values = (_pool(s.batch * blocks, s.block_size, s, dtype, device) for _ in range(2))
    row_bytes = s.head_dim * dtype.itemsize
    bytes_per_set = 2 * s.batch * heads * s.k * s.block_size * row_bytes
    # So many sets have no row in common.
    sets = min(_set_count(bytes_per_set, rotated_bytes, device), max(blocks // s.k, 1))
    generator = torch.Generator().manual_seed(1)
    seq_lens = torch.tensor(s.seq_lens, dtype=torch.int32, device=device)
    query = _noise((s.batch, s.num_heads, s.head_dim), dtype, device)
    out = torch.empty_like(query)
    order = torch.randperm(s.batch * blocks, generator=generator).view(s.batch, blocks)
    calls, touched, problems = [], [], []
    for turn in range(sets):
        selected, tables = _selected_places(order, heads, s.k, turn)
        places = tables[torch.arange(s.batch)[:, None, None], selected.long()].long().to(device)
        wide = torch.zeros(s.batch, max(blocks, s.table_blocks), dtype=torch.int32, device=device)
        wide[:, :blocks] = tables.to(device)
        arguments = (query, keys, values, wide, seq_lens, selected.to(device))
        calls.append(functools.partial(paged_select_attention, *arguments, out=out))
        # As many rows in as many places: whose they are does not matter to the speed of a read.
        shared = max(heads * s.k // blocks, 1)
        step = max(blocks // (heads * s.k), 1)
        first = turn % (heads // shared) * shared
        touched.append([pool[::step, :, first : first + shared] for pool in (keys, values)])
        problems.append(alternatives.AttentionProblem(query, keys, values, places))

    @functools.cache
    def expected() -> torch.Tensor:
        return alternatives.attend(problems[0])

    def check() -> None:
        out.fill_(_NEVER_WRITTEN)
        calls[0]()
        error = max(torch.finfo(dtype).eps * 4, 1e-5)
        if not torch.allclose(out.float(), expected().float(), rtol=error, atol=error):
            raise WrongResultError("out is not the reference's")

    work = bytes_per_set + query.nbytes + out.nbytes
    return _case(spec, calls, touched, work, problems, check, device)

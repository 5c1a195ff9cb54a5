"""Random calls against the references: shapes, strides, lengths and values that nobody thought of.

300 cases per operator; 10,000 with ``--hypothesis-profile=full``. ``--device`` says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from common.compare import assert_attention_matches, assert_selection_matches
from common.layouts import GUARD_VALUE, clone_with_storage, whole_storage
from common.paged import ceil_div
from gen_data_paged_select_attention import AttentionInputs, gen_data_paged_select_attention
from gen_data_quest_block_select_paged import SelectInputs, gen_data_quest_block_select_paged
from gen_data_quest_prefill_metadata import PrefillMetadataInputs, gen_data_quest_prefill_metadata
from gen_data_selected_block_tables import TablesInputs, gen_data_selected_block_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from placements import Placed, assert_holds, moved, place, placements, same_bits
from ref_paged_select_attention import paged_select_attention_ref
from ref_quest_block_select_paged import (
    SelectionReference,
    forced_blocks,
    quest_block_select_paged_ref,
)
from ref_quest_prefill_metadata import quest_prefill_metadata_ref
from ref_selected_block_tables import selected_block_tables_ref
from select_attn_ops import (
    paged_select_attention,
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_prefill_metadata,
    runtime,
    selected_block_tables,
    set_num_threads,
)

THREADS = (1, 2, 5)
# Elements of a KV block, of a metadata block, and of all keys or metadata rows of a call.
_MOST_PER_BLOCK, _MOST_PER_CALL = 15_000, 60_000
_POISON = -77
_NOT_READ = 2**31 - 1

# Where the operators run: what `--device` says, once a test runs.
DEVICE = torch.device("cpu")
# Beyond these a backend for a device need not go.
_HEAD_DIM_STEP, _MOST_HEAD_DIM, _MOST_K = 8, 256, 2048


@pytest.fixture(scope="module", autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    global DEVICE
    DEVICE = device
    yield
    DEVICE = torch.device("cpu")


@pytest.fixture
def cpu_only(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("SIMD targets are the CPU's")


fewer = settings(max_examples=max(1, settings().max_examples // 5))


def configurations(shift: int = 0) -> Iterator[tuple[str, int]]:
    """Yield every SIMD target with one number of threads, and the best target with all of them.

    On a device there is no such choice: two runs.
    """
    if DEVICE.type != "cpu":
        yield from [(DEVICE.type, 0)] * 2
        return
    best, *others = runtime.simd_targets()
    for target, threads in [
        *((best, threads) for threads in THREADS),
        *((target, THREADS[(i + shift) % 3]) for i, target in enumerate(others)),
    ]:
        runtime.set_simd_target(target)
        set_num_threads(threads)
        yield target, threads


def most(limit: int, *extents: int) -> int:
    """Return how many things of ``extents`` elements stay within a limit, at least 1."""
    product = 1
    for extent in extents:
        product *= extent
    return max(1, limit // product)


# What calls are made of.

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
block_sizes = st.one_of(st.sampled_from((1, 2, 7, 8, 9, 15, 16, 17, 64, 128)), st.integers(1, 200))


@st.composite
def head_dims(draw: st.DrawFn) -> int:
    edges = st.sampled_from((1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 256))
    head_dim = draw(st.one_of(edges, st.integers(1, 300)))
    if DEVICE.type == "cpu":
        return head_dim
    steps = min(ceil_div(head_dim, _HEAD_DIM_STEP), _MOST_HEAD_DIM // _HEAD_DIM_STEP)
    return steps * _HEAD_DIM_STEP


def capped(strategy: st.SearchStrategy[int], limit: int) -> st.SearchStrategy[int]:
    """Keep numbers within ``limit``: a larger one stands for one in ``[1, limit]``."""
    return strategy.map(lambda number: number if number <= limit else (number - 1) % limit + 1)


@st.composite
def lengths(draw: st.DrawFn, batch: int, block_size: int, most_blocks: int) -> list[int]:
    """Draw tokens per request: no request has more than its share of ``most_blocks`` blocks."""
    share = max(1, most_blocks // max(batch, 1))
    drawn = []
    for _ in range(batch):
        blocks = draw(st.one_of(st.integers(0, min(3, share)), st.integers(0, share)))
        tokens = draw(
            st.one_of(st.sampled_from((0, 1, block_size - 1)), st.integers(0, block_size - 1))
        )
        drawn.append(min(blocks * block_size + tokens, share * block_size))
    return drawn


@st.composite
def known_lengths(draw: st.DrawFn, seq_lens: list[int], block_size: int) -> list[int]:
    """Draw metadata lengths in ``[0, seq_len]``, often around a block boundary."""
    drawn = []
    for length in seq_lens:
        any_length = draw(st.integers(0, length))
        near = any_length // block_size * block_size + draw(st.integers(-1, 1))
        chosen = draw(st.sampled_from((any_length, near, near, length, length - block_size, 0)))
        drawn.append(min(max(chosen, 0), length))
    return drawn


def rows_per_block(block_size: int, *per_row: int) -> st.SearchStrategy[int]:
    """Draw R: 1, block_size, and whatever lies between and beyond."""
    limit = most(_MOST_PER_BLOCK, *per_row)
    return capped(
        st.one_of(
            st.sampled_from((1, block_size)),
            st.integers(1, block_size),
            st.integers(block_size, 2 * block_size + 3),
        ),
        limit,
    )


def hostile_bits(dtype: torch.dtype) -> torch.Tensor:
    """Return values at the edges of a type: every kind of NaN, infinities, zeros, subnormals."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(bits))
    sign = torch.iinfo(bits).min
    magnitudes = [0, 1, infinity - 1, infinity, infinity + 1, torch.iinfo(bits).max]
    magnitudes += [int(torch.tensor(torch.finfo(dtype).tiny, dtype=dtype).view(bits)) - 1]
    both = [*magnitudes, *(sign + magnitude for magnitude in magnitudes)]
    return torch.tensor(both, dtype=bits).view(dtype)


def make_hostile(data: torch.Tensor, seed: int, share: float) -> None:
    """Replace a share of ``data`` by hostile values."""
    generator = torch.Generator().manual_seed(seed)
    values = hostile_bits(data.dtype)
    where = torch.rand(data.shape, generator=generator) < share
    data[where] = values[torch.randint(len(values), (int(where.sum()),), generator=generator)]


shares = st.sampled_from((0.0, 0.0, 0.002, 0.05, 1.0))


@dataclass
class Layouts:
    """Draws a placement per operand and places it."""

    draw: st.DrawFn
    numpy: bool

    def place(
        self, data: torch.Tensor, *, may_share: bool = False, written: bool = False
    ) -> Placed:
        rank = data.dim()
        shared: tuple[int, ...] = ()
        if may_share and rank > 1 and self.draw(st.integers(0, 4)) == 0:
            shared = (self.draw(st.integers(0, rank - 2)),)
        fill: float = _NOT_READ
        if data.is_floating_point():
            fill = GUARD_VALUE if written else float("nan")
        elif written:
            fill = _POISON - 1
        numpy = self.numpy and data.dtype != torch.bfloat16 and DEVICE.type == "cpu"
        placement = self.draw(placements(rank, numpy=numpy))
        return place(data, placement, fill=fill, shared=shared)


def run(
    outputs: dict[str, Placed],
    inputs: dict[str, Placed],
    call: Callable[[], Any],
    shift: int,
    check: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    """Call in every configuration on the same bytes, and check outputs, guards and inputs.

    The results of a target must be the same bits, whatever the threads and in every run.
    """
    before = {name: placed.storage.clone() for name, placed in outputs.items()}
    read = {name: placed.storage.clone() for name, placed in inputs.items()}
    last_target, right = "", None
    for target, threads in configurations(shift):
        for name, placed in outputs.items():
            placed.storage.copy_(before[name])
        with moved([*outputs.values(), *inputs.values()], DEVICE):
            call()
        same = right is not None and all(
            same_bits(placed.storage, right[name]) for name, placed in outputs.items()
        )
        assert same or target != last_target, f"the result depends on {threads} threads"
        if not same:
            check(before)
            right = {name: placed.storage.clone() for name, placed in outputs.items()}
        last_target = target
    for name, placed in inputs.items():
        assert same_bits(placed.storage, read[name]), f"{name} was written"


# quest_prefill_metadata


@dataclass
class Prefill:
    """One call on pools of its own."""

    placed: dict[str, Placed]
    shift: int

    def call(self) -> None:
        views = {name: placed.view for name, placed in self.placed.items()}
        quest_prefill_metadata(**views)

    def dense(self) -> PrefillMetadataInputs:
        """Return the operands as the operator sees them, shared dimensions included."""
        return PrefillMetadataInputs(
            **{name: placed.dense() for name, placed in self.placed.items()}
        )

    def check(self) -> None:
        outputs = {name: self.placed[name] for name in ("maxblocks", "minblocks")}
        inputs = {name: placed for name, placed in self.placed.items() if name not in outputs}
        dense = self.dense()
        expected: dict[str, torch.Tensor] = {}

        def compare(before: dict[str, torch.Tensor]) -> None:
            if not expected:
                positional, keywords = dense.arguments()
                results = quest_prefill_metadata_ref(*positional, **keywords)
                expected.update(zip(outputs, results, strict=True))
            for name, placed in outputs.items():
                assert_holds(name, placed, before[name], expected[name])

        run(outputs, inputs, self.call, self.shift, compare)


@st.composite
def prefill_inputs(draw: st.DrawFn, *, update: bool = True) -> PrefillMetadataInputs:
    heads, head_dim = draw(st.integers(1, 9)), draw(head_dims())
    block_size = draw(capped(block_sizes, most(_MOST_PER_BLOCK, heads, head_dim)))
    keyed = draw(st.integers(0, 4)) == 0
    rows = 1 if keyed else draw(rows_per_block(block_size, heads, head_dim))
    batch = draw(st.integers(0, 5))
    seq_lens = draw(
        lengths(batch, block_size, most(_MOST_PER_CALL, heads, head_dim, max(block_size, rows)))
    )
    known = None
    if update and draw(st.booleans()):
        known = draw(known_lengths(seq_lens, block_size))
    inputs = gen_data_quest_prefill_metadata(
        seq_lens,
        num_kv_heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        rows=rows,
        dtype=draw(dtypes),
        metadata_seq_lens=known,
        spare_columns=draw(st.integers(0, 2)),
        values=draw(st.sampled_from(("normal", "positive", "negative", "extreme", "special"))),
        keyed_by_physical_block=keyed,
        seed=draw(seeds),
    )
    make_hostile(inputs.k_cache, draw(seeds), draw(shares))
    if keyed and batch > 1 and draw(st.booleans()):
        # Two requests with the same blocks describe them alike.
        for tensor in (inputs.seq_lens, inputs.block_tables, inputs.metadata_seq_lens):
            if tensor is not None:
                tensor[1] = tensor[0]
        inputs.metadata_block_tables = inputs.block_tables
    return inputs


@st.composite
def prefills(draw: st.DrawFn) -> Prefill:
    inputs = draw(prefill_inputs())
    layouts = Layouts(draw, draw(st.integers(0, 2)) == 0)
    placed = {}
    for field in fields(inputs):
        tensor = getattr(inputs, field.name)
        if tensor is not None:
            written = field.name in ("maxblocks", "minblocks")
            placed[field.name] = layouts.place(
                tensor, written=written, may_share=field.name == "k_cache"
            )
    return Prefill(placed, draw(st.integers(0, 2)))


@given(prefills())
def test_quest_prefill_metadata(call: Prefill) -> None:
    call.check()


def fill_tables(inputs: PrefillMetadataInputs) -> None:
    """Name the metadata blocks of an update that lie before its range, too."""
    columns = inputs.metadata_block_tables.shape[1]
    batch = len(inputs.seq_lens)
    shape = (batch * columns, *inputs.maxblocks.shape[1:])
    inputs.metadata_block_tables = torch.randperm(batch * columns).view(batch, columns).int()
    inputs.maxblocks = torch.full(shape, 5).to(inputs.k_cache.dtype)
    inputs.minblocks = torch.full(shape, -5).to(inputs.k_cache.dtype)


def prefill(inputs: PrefillMetadataInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pools after a call on copies of them."""
    inputs = replace(
        inputs,
        maxblocks=clone_with_storage(inputs.maxblocks),
        minblocks=clone_with_storage(inputs.minblocks),
    )
    there = inputs.map(lambda tensor: tensor.to(DEVICE))
    positional, keywords = there.arguments()
    quest_prefill_metadata(*positional, **keywords)
    return there.maxblocks.cpu(), there.minblocks.cpu()


def assert_same_pools(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for name, one, other in zip(("maxblocks", "minblocks"), actual, expected, strict=True):
        assert same_bits(one, other), name


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("target", runtime.simd_targets())
def test_many_short_blocks_at_every_target(target: str) -> None:
    """Enough of them, and so little in order, that they are taken in the order of the pool."""
    runtime.set_simd_target(target)
    seq_lens, known = [5000, 0, 3001, 1500, 7], [1200, 0, 0, 1500, 3]
    options: dict[str, Any] = {"block_size": 4, "values": "special"}
    # Rows of whole cache lines; of broken ones; of whole ones that lie across lines, all of them or
    # all but the first head's.
    cases: list[dict[str, Any]] = [
        {"head_dim": 128, "num_kv_heads": 1},
        {"head_dim": 64, "dtype": torch.float16, "metadata_seq_lens": known},
        {"head_dim": 16, "dtype": torch.float32, "shared_kv_blocks": 300},
        {"head_dim": 24, "keyed_by_physical_block": True},
        {"head_dim": 32, "layout": "unaligned", "rows": 3},
        {"head_dim": 32, "layout": "padded", "rows": 16},
    ]
    for case in cases:
        inputs = gen_data_quest_prefill_metadata(seq_lens, **options, **case)
        positional, keywords = inputs.arguments()
        expected = quest_prefill_metadata_ref(*positional, **keywords)
        for threads in THREADS:
            set_num_threads(threads)
            for actual, pool in zip(prefill(inputs), expected, strict=True):
                torch.testing.assert_close(actual, pool, rtol=0, atol=0, equal_nan=True)
                actual.fill_(GUARD_VALUE)
                assert bool((whole_storage(actual) == GUARD_VALUE).all()), "written beside the rows"


@fewer
@given(prefill_inputs(update=False), st.data())
def test_prefill_in_updates_is_one_prefill(inputs: PrefillMetadataInputs, data: Any) -> None:
    fill_tables(inputs)
    whole = prefill(inputs)
    block_size = inputs.k_cache.shape[1]
    seq_lens = inputs.seq_lens.tolist()
    steps = [seq_lens]
    for _ in range(data.draw(st.integers(1, 3))):
        steps.insert(0, data.draw(known_lengths(steps[0], block_size)))
    inputs.metadata_seq_lens = torch.zeros_like(inputs.seq_lens)
    for step in steps:
        inputs.seq_lens = torch.tensor(step, dtype=torch.int32)
        inputs.maxblocks, inputs.minblocks = prefill(inputs)
        inputs.metadata_seq_lens = inputs.seq_lens
    assert_same_pools((inputs.maxblocks, inputs.minblocks), whole)


@fewer
@given(prefill_inputs(), st.randoms(use_true_random=False))
def test_prefill_does_not_depend_on_the_batch(inputs: PrefillMetadataInputs, random: Any) -> None:
    together = prefill(inputs)
    alone = replace(inputs, maxblocks=inputs.maxblocks, minblocks=inputs.minblocks)
    order = list(range(len(inputs.seq_lens)))
    random.shuffle(order)
    for b in order:
        request = inputs.requests(b, b + 1)
        request.maxblocks, request.minblocks = alone.maxblocks, alone.minblocks
        set_num_threads(random.choice(THREADS))
        alone.maxblocks, alone.minblocks = prefill(request)
    assert_same_pools((alone.maxblocks, alone.minblocks), together)
    shuffled = replace(
        inputs,
        block_tables=inputs.block_tables[order],
        seq_lens=inputs.seq_lens[order],
        metadata_block_tables=inputs.metadata_block_tables[order],
        metadata_seq_lens=None
        if inputs.metadata_seq_lens is None
        else inputs.metadata_seq_lens[order],
    )
    assert_same_pools(prefill(shuffled), together)


# quest_block_select_paged


@dataclass
class Select:
    """One call, through one of the functions that select."""

    placed: dict[str, Placed]
    out: Placed
    interface: str
    tokens_since_metadata_update: int
    block_size: int | None
    shift: int

    @property
    def k(self) -> int:
        return self.out.index.shape[-1]

    def views(self) -> dict[str, Any]:
        return {name: placed.view for name, placed in self.placed.items()}

    def call(self) -> None:
        views, tokens = self.views(), self.tokens_since_metadata_update
        keywords = {} if self.block_size is None else {"block_size": self.block_size}
        if self.interface == "in_out":
            quest_block_select_paged_in_out(**views, selected_indices=self.out.view)
        elif self.interface == "in_out_w":
            quest_block_select_paged_in_out_w(
                **views, tokens_since_metadata_update=tokens, selected_indices=self.out.view
            )
        elif self.interface == "out":
            result = quest_block_select_paged(
                **views, tokens_since_metadata_update=tokens, out=self.out.view, **keywords
            )
            assert result is self.out.view
        else:
            result = quest_block_select_paged(
                **views, k=self.k, tokens_since_metadata_update=tokens, **keywords
            )
            assert type(result) is type(views["query"])
            self.out.put(result)

    def reference(self) -> SelectionReference:
        dense = {name: placed.dense() for name, placed in self.placed.items()}
        return quest_block_select_paged_ref(
            **dense,
            k=self.k,
            tokens_since_metadata_update=self.tokens_since_metadata_update,
            block_size=self.block_size,
        )

    def check(self) -> None:
        expected: list[SelectionReference] = []

        def compare(before: dict[str, torch.Tensor]) -> None:
            if not expected:
                expected.append(self.reference())
            selected = self.out.dense()
            assert_selection_matches(selected, expected[0])
            assert_holds("selected_indices", self.out, before["out"], selected)

        run({"out": self.out}, self.placed, self.call, self.shift, compare)


@st.composite
def windows(draw: st.DrawFn, seq_lens: list[int], block_size: int) -> dict[str, Any]:
    """Draw none, one number for all requests, or one per request."""
    kind = draw(st.sampled_from(("none", "scalar", "scalar", "per_request", "per_request")))
    if kind == "per_request":
        return {"metadata_seq_lens": draw(known_lengths(seq_lens, block_size))}
    if kind == "none":
        return {}
    longest = max(seq_lens, default=0)
    near = draw(st.integers(0, longest // block_size + 1)) * block_size + draw(st.integers(-1, 1))
    tokens = draw(
        st.sampled_from((0, 1, near, near, near, block_size - 1, longest, 2**31 - 1, 2**40))
    )
    return {"tokens_since_metadata_update": max(tokens, -1)}


@st.composite
def select_inputs(draw: st.DrawFn) -> SelectInputs:
    kv_heads, group, head_dim = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(head_dims())
    block_size = draw(block_sizes)
    rows = draw(rows_per_block(block_size, kv_heads, head_dim))
    batch = draw(st.integers(0, 5))
    limit = min(most(_MOST_PER_CALL, kv_heads, head_dim), 1500)
    seq_lens = draw(lengths(batch, block_size, limit))
    # The table is as wide as it must be, or wider.
    longest = max(seq_lens, default=0)
    columns = ceil_div(ceil_div(longest, block_size), rows) + draw(st.integers(0, 2))
    window = draw(windows(seq_lens, block_size))
    if window and draw(st.booleans()):
        columns = ceil_div(_most_scored(seq_lens, window, block_size), rows)
    inputs = gen_data_quest_block_select_paged(
        seq_lens,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rows=rows,
        block_size=block_size,
        dtype=draw(dtypes),
        columns=columns,
        values=draw(st.sampled_from(("normal", "unordered", "exact", "exact", "ties", "special"))),
        seed=draw(seeds),
        **window,
    )
    if rows == block_size > 1:
        inputs.block_size = draw(st.sampled_from((None, None, block_size)))
    if draw(st.booleans()):
        share, seed = draw(shares), draw(seeds)
        for i, tensor in enumerate((inputs.query, inputs.maxblocks, inputs.minblocks)):
            make_hostile(tensor, seed + i, share / (head_dim if share < 1 else 1))
    return inputs


def _most_scored(seq_lens: list[int], window: dict[str, Any], block_size: int) -> int:
    """Return one more than the greatest number of a block that some request scores; 0 for none."""
    tokens = window.get("tokens_since_metadata_update", -1)
    known = window.get("metadata_seq_lens")
    if known is None:
        known = [None if tokens < 0 else max(length - tokens, 0) for length in seq_lens]
    greatest = 0
    for length, covered in zip(seq_lens, known, strict=True):
        forced = forced_blocks(length, covered, block_size)
        scored = set(range(ceil_div(length, block_size))) - set(forced)
        greatest = max([greatest, *(j + 1 for j in scored)])
    return greatest


@st.composite
def slots(draw: st.DrawFn, inputs: SelectInputs) -> int:
    """Draw k, from 1 to more than there are blocks."""
    block_size = inputs.block_size or inputs.maxblocks.shape[1]
    blocks = ceil_div(int(max(inputs.seq_lens.tolist(), default=0)), block_size)
    k = draw(
        st.one_of(
            st.integers(1, blocks + 5),
            st.sampled_from((1, 2, 8, max(blocks, 1), blocks + 1, 2 * blocks + 300)),
        )
    )
    return k if DEVICE.type == "cpu" else min(k, _MOST_K)


@st.composite
def selects(draw: st.DrawFn) -> Select:
    inputs = draw(select_inputs())
    layouts = Layouts(draw, draw(st.integers(0, 2)) == 0)
    shareable = ("query", "maxblocks", "minblocks")
    placed = {}
    for field in fields(inputs):
        tensor = getattr(inputs, field.name)
        if isinstance(tensor, torch.Tensor):
            placed[field.name] = layouts.place(tensor, may_share=field.name in shareable)
    interfaces = ["k", "out"]
    if inputs.block_size is None and inputs.metadata_seq_lens is None:
        interfaces.append("in_out_w")
        if inputs.tokens_since_metadata_update == -1:
            interfaces.append("in_out")
    shape = (len(inputs.seq_lens), inputs.maxblocks.shape[2], draw(slots(inputs)))
    out = layouts.place(torch.full(shape, _POISON, dtype=torch.int32), written=True)
    return Select(
        placed,
        out,
        draw(st.sampled_from(interfaces)),
        inputs.tokens_since_metadata_update,
        inputs.block_size,
        draw(st.integers(0, 2)),
    )


@given(selects())
def test_quest_block_select_paged(call: Select) -> None:
    call.check()


def select(inputs: SelectInputs, k: int) -> torch.Tensor:
    there = inputs.map(lambda tensor: tensor.to(DEVICE))
    return quest_block_select_paged(*there.positional, k, **there.keywords).cpu()


@fewer
@given(select_inputs(), st.data(), st.randoms(use_true_random=False))
def test_select_does_not_depend_on_the_batch(inputs: SelectInputs, data: Any, random: Any) -> None:
    k = data.draw(slots(inputs))
    together = select(inputs, k)
    order = list(range(len(inputs.seq_lens)))
    random.shuffle(order)
    for b in order:
        set_num_threads(random.choice(THREADS))
        assert torch.equal(select(inputs.requests(b, b + 1), k), together[b : b + 1])
    shuffled = replace(
        inputs,
        query=inputs.query[order],
        metadata_block_tables=inputs.metadata_block_tables[order],
        seq_lens=inputs.seq_lens[order],
        metadata_seq_lens=None
        if inputs.metadata_seq_lens is None
        else inputs.metadata_seq_lens[order],
    )
    assert torch.equal(select(shuffled, k), together[order])


@fewer
@given(select_inputs(), st.data())
def test_less_k_is_a_prefix(inputs: SelectInputs, data: Any) -> None:
    """The order is total, so the best k are the first k of any more."""
    more = data.draw(slots(inputs))
    k = data.draw(st.integers(1, more))
    assert torch.equal(select(inputs, k), select(inputs, more)[..., :k])


@fewer
@given(select_inputs(), st.data())
def test_window_of_all_is_the_window_of_each(inputs: SelectInputs, data: Any) -> None:
    """``tokens_since_metadata_update`` is short for one ``metadata_seq_lens`` per request."""
    tokens = inputs.tokens_since_metadata_update
    if inputs.metadata_seq_lens is not None or tokens < 0:
        inputs.metadata_seq_lens, tokens = None, 2**40  # all blocks are window: no row is read
        inputs.tokens_since_metadata_update = tokens
    k = data.draw(slots(inputs))
    scalar = select(inputs, k)
    known = (inputs.seq_lens.long() - tokens).clamp(min=0).to(torch.int32)
    each = replace(inputs, tokens_since_metadata_update=-1, metadata_seq_lens=known)
    assert torch.equal(select(each, k), scalar)


@fewer
@given(select_inputs(), st.data())
def test_rows_per_metadata_block_do_not_matter(inputs: SelectInputs, data: Any) -> None:
    """The same rows, one per metadata block, are the same selection."""
    k = data.draw(slots(inputs))
    block_size = inputs.block_size or inputs.maxblocks.shape[1]
    rows = inputs.maxblocks.shape[1]
    table = inputs.metadata_block_tables.long()[..., None] * rows + torch.arange(rows)
    table = table.clamp(-1, 2**31 - 1).to(torch.int32).flatten(1)
    flat = replace(
        inputs,
        maxblocks=inputs.maxblocks.flatten(0, 1)[:, None],
        minblocks=inputs.minblocks.flatten(0, 1)[:, None],
        metadata_block_tables=table,
        block_size=block_size,
    )
    assert torch.equal(select(flat, k), select(inputs, k))


# selected_block_tables


@dataclass
class Tables:
    """One call."""

    block_size: int
    placed: dict[str, Placed]
    outputs: dict[str, Placed]
    given_outputs: bool
    shift: int

    def call(self) -> None:
        views = {name: placed.view for name, placed in self.placed.items()}
        if self.given_outputs:
            views.update({name: placed.view for name, placed in self.outputs.items()})
        results = selected_block_tables(**views, block_size=self.block_size)
        for (name, placed), result in zip(self.outputs.items(), results, strict=True):
            if self.given_outputs:
                assert result is views[name]
            else:
                placed.put(result)

    def check(self) -> None:
        def compare(before: dict[str, torch.Tensor]) -> None:
            dense = {name: placed.dense() for name, placed in self.placed.items()}
            results = selected_block_tables_ref(**dense, block_size=self.block_size)
            for (name, placed), result in zip(self.outputs.items(), results, strict=True):
                assert_holds(name, placed, before[name], result)

        run(self.outputs, self.placed, self.call, self.shift, compare)


@st.composite
def tables_inputs(draw: st.DrawFn) -> TablesInputs:
    batch, kv_heads = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    long_blocks = st.sampled_from((2**20, 2**24 + 3, 2**31 - 1, 2**40))
    block_size = draw(st.one_of(block_sizes, block_sizes, block_sizes, long_blocks))
    blocks = 400 if block_size <= 200 else max(1, (2**31 - 1) // block_size)
    seq_lens = [
        min(length, 2**31 - 1)
        for length in draw(lengths(batch, block_size, batch * min(blocks, 400)))
    ]
    longest = ceil_div(max(seq_lens, default=0), block_size)
    k = draw(st.one_of(st.integers(1, longest + 5), st.sampled_from((1, 8, 64, longest + 90))))
    # A repeated block may hold more tokens than an int32 counts.
    selections = ("distinct", "scattered", "repeated") if block_size <= 200 else ("scattered",)
    return gen_data_selected_block_tables(
        seq_lens,
        k,
        num_kv_heads=kv_heads,
        block_size=block_size,
        selection=draw(st.sampled_from(selections)),
        spare_columns=draw(st.integers(0, 2)),
        seed=draw(seeds),
    )


@st.composite
def tables_calls(draw: st.DrawFn) -> Tables:
    inputs = draw(tables_inputs())
    layouts = Layouts(draw, draw(st.integers(0, 2)) == 0)
    selected = inputs.selected_indices
    shape = tuple(selected.shape)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(seeds))
        selected[torch.rand(shape, generator=generator) < 0.3] = -1
    outputs = {
        "out": layouts.place(torch.full(shape, _POISON, dtype=torch.int32), written=True),
        "lens_out": layouts.place(torch.full(shape[:2], _POISON, dtype=torch.int32), written=True),
    }
    placed = {
        "selected_indices": layouts.place(selected),
        "block_tables": layouts.place(inputs.block_tables),
        "seq_lens": layouts.place(inputs.seq_lens),
    }
    return Tables(inputs.block_size, placed, outputs, draw(st.booleans()), draw(st.integers(0, 2)))


@given(tables_calls())
def test_selected_block_tables(call: Tables) -> None:
    call.check()


def test_tables_of_near_far_and_repeated_blocks_in_turn() -> None:
    blocks, k = 20_000, 6
    rows = [
        [19_999, 3, 12_345, -1, -1, 64],
        [100, 64, 63, 65, 0, 127],
        [70, 5, 70, 5, 70, 5],
        [1, 66, 2, 67, 3, 68],  # none of the row before
        [-1] * k,
        [9, 8, 19_998, 7, 19_998, 6],
        [127, 126, 125, 4, 64, 63],
    ]
    selected = torch.tensor([rows], dtype=torch.int32)
    block_tables = torch.randperm(blocks, dtype=torch.int32)[None]
    seq_lens = torch.tensor([blocks * 2 - 1], dtype=torch.int32)
    set_num_threads(1)
    tables, lens = selected_block_tables(selected, block_tables, seq_lens, block_size=2)
    for row, table, length in zip(rows, tables[0], lens[0], strict=True):
        listed = sorted(number for number in row if number >= 0)
        expected = [*block_tables[0, listed].tolist(), *[-1] * (k - len(listed))]
        assert table.tolist() == expected
        assert length == sum(1 if number == blocks - 1 else 2 for number in listed)


def tables_of(inputs: TablesInputs) -> tuple[torch.Tensor, torch.Tensor]:
    there = inputs.map(lambda tensor: tensor.to(DEVICE))
    tables, lens = selected_block_tables(*there.positional, block_size=inputs.block_size)
    return tables.cpu(), lens.cpu()


@fewer
@given(tables_inputs(), st.randoms(use_true_random=False))
def test_tables_do_not_depend_on_batch_and_order(inputs: TablesInputs, random: Any) -> None:
    tables, lens = tables_of(inputs)
    order = list(range(inputs.selected_indices.shape[-1]))
    random.shuffle(order)
    set_num_threads(random.choice(THREADS))
    shuffled = replace(inputs, selected_indices=inputs.selected_indices[..., order].contiguous())
    for actual, expected in zip(tables_of(shuffled), (tables, lens), strict=True):
        assert torch.equal(actual, expected)
    for b in range(len(inputs.seq_lens)):
        alone = inputs.map(lambda tensor, b=b: tensor[b : b + 1])
        for actual, expected in zip(tables_of(alone), (tables, lens), strict=True):
            assert torch.equal(actual, expected[b : b + 1])


# paged_select_attention


@dataclass
class Attention:
    """One call."""

    placed: dict[str, Placed]
    scale: float | None
    outputs: dict[str, Placed]
    given_out: bool
    given_lse: bool
    shift: int

    def call(self) -> None:
        views: dict[str, Any] = {name: placed.view for name, placed in self.placed.items()}
        if self.given_lse:
            views["lse"] = self.outputs["lse"].view
        if self.given_out:
            views["out"] = self.outputs["out"].view
        result = paged_select_attention(**views, scale=self.scale)
        if self.given_out:
            assert result is views["out"]
        else:
            assert type(result) is type(views["query"])
            self.outputs["out"].put(result)

    def check(self) -> None:
        dense = {name: placed.dense() for name, placed in self.placed.items()}

        def compare(before: dict[str, torch.Tensor]) -> None:
            reference = paged_select_attention_ref(**dense, scale=self.scale)
            lse = self.outputs["lse"].dense() if self.given_lse else None
            assert_attention_matches(self.outputs["out"].dense(), lse, reference)
            for name, placed in self.outputs.items():
                assert_holds(name, placed, before[name], placed.dense())

        run(self.outputs, self.placed, self.call, self.shift, compare)


@st.composite
def attention_inputs(draw: st.DrawFn) -> AttentionInputs:
    kv_heads, group, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(head_dims())
    # Blocks longer than the kernels' chunks among them.
    long_blocks = st.sampled_from((1023, 1024, 1025, 2500))
    any_block = st.one_of(block_sizes, block_sizes, block_sizes, long_blocks)
    block_size = draw(capped(any_block, most(_MOST_PER_CALL, kv_heads, head_dim)))
    batch = draw(st.integers(0, 4))
    limit = min(most(_MOST_PER_CALL, kv_heads, head_dim, block_size), 1500)
    seq_lens = draw(lengths(batch, block_size, limit))
    longest = ceil_div(max(seq_lens, default=0), block_size)
    k = draw(st.one_of(st.integers(1, longest + 5), st.sampled_from((1, 8, longest + 90))))
    inputs = gen_data_paged_select_attention(
        seq_lens,
        k,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=draw(dtypes),
        selection=draw(st.sampled_from(("distinct", "scattered", "repeated"))),
        scale=draw(st.sampled_from((None, None, 1.0, 0.0, -0.3, 8.0, 1e-3))),
        spare_columns=draw(st.integers(0, 2)),
        values=draw(st.sampled_from(("normal", "normal", "large", "special"))),
        seed=draw(seeds),
    )
    if draw(st.booleans()):
        share, seed = draw(shares), draw(seeds)
        for i, tensor in enumerate((inputs.query, inputs.k_cache, inputs.v_cache)):
            # Unread keys and values are hostile already.
            make_hostile(tensor, seed + i, share / (head_dim if share < 1 else 1))
    return inputs


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    inputs = draw(attention_inputs())
    layouts = Layouts(draw, draw(st.integers(0, 2)) == 0)
    placed = {}
    for field in fields(inputs):
        tensor = getattr(inputs, field.name)
        if isinstance(tensor, torch.Tensor):
            shareable = field.name in ("query", "k_cache", "v_cache")
            placed[field.name] = layouts.place(tensor, may_share=shareable)
    shape = tuple(inputs.query.shape)
    out = torch.full(shape, _POISON, dtype=inputs.query.dtype)
    outputs = {
        "out": layouts.place(out, written=True),
        "lse": layouts.place(torch.full(shape[:2], float(_POISON)), written=True),
    }
    given = (draw(st.booleans()), draw(st.booleans()))
    return Attention(placed, inputs.scale, outputs, *given, draw(st.integers(0, 2)))


@given(attentions())
def test_paged_select_attention(call: Attention) -> None:
    call.check()


def attend(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    there = inputs.map(lambda tensor: tensor.to(DEVICE))
    lse = torch.empty(there.query.shape[:2], device=DEVICE)
    out = paged_select_attention(*there.positional, **there.keywords, lse=lse)
    return out.cpu(), lse.cpu()


def assert_same_attention(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for name, one, other in zip(("out", "lse"), actual, expected, strict=True):
        assert same_bits(one, other), name


@fewer
@given(attention_inputs(), st.randoms(use_true_random=False))
def test_attention_does_not_depend_on_the_batch(inputs: AttentionInputs, random: Any) -> None:
    together = attend(inputs)
    order = list(range(len(inputs.seq_lens)))
    random.shuffle(order)
    for b in order:
        set_num_threads(random.choice(THREADS))
        alone = attend(inputs.requests(b, b + 1))
        assert_same_attention(alone, (together[0][b : b + 1], together[1][b : b + 1]))
    shuffled = replace(
        inputs,
        query=inputs.query[order],
        block_tables=inputs.block_tables[order],
        seq_lens=inputs.seq_lens[order],
        selected_indices=inputs.selected_indices[order],
    )
    assert_same_attention(attend(shuffled), (together[0][order], together[1][order]))


@fewer
@given(attention_inputs(), st.integers(1, 40))
def test_empty_slots_behind_do_not_matter(inputs: AttentionInputs, more: int) -> None:
    padding = inputs.selected_indices.new_full((*inputs.selected_indices.shape[:2], more), -1)
    wide = replace(inputs, selected_indices=torch.cat([inputs.selected_indices, padding], -1))
    assert_same_attention(attend(wide), attend(inputs))


@fewer
@given(attention_inputs(), seeds)
def test_what_is_not_selected_does_not_matter(inputs: AttentionInputs, seed: int) -> None:
    """Whatever takes the place of the poison, the bits are the same."""
    result = attend(inputs)
    read = torch.zeros(inputs.k_cache.shape[:3], dtype=torch.bool)
    block_size = read.shape[1]
    for b, heads in enumerate(inputs.selected_indices.tolist()):
        for n, row in enumerate(heads):
            for j in row:
                if j >= 0:
                    count = int(inputs.seq_lens[b]) - j * block_size
                    read[int(inputs.block_tables[b, j]), :count, n] = True
    generator = torch.Generator().manual_seed(seed)
    for cache in (inputs.k_cache, inputs.v_cache):
        other = torch.randn(cache.shape, generator=generator).to(cache.dtype)
        cache[~read] = other[~read]
    assert_same_attention(attend(inputs), result)


def assert_select_matches_the_reference(inputs: SelectInputs, k: int) -> None:
    """Check a call, and that the number of threads does not matter."""
    reference = quest_block_select_paged_ref(*inputs.positional, k, **inputs.keywords)
    results = []
    for threads in THREADS:
        set_num_threads(threads)
        results.append(select(inputs, k))
        assert_selection_matches(results[-1], reference)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def spread(inputs: SelectInputs, factor: int) -> SelectInputs:
    """Return the same call with the metadata blocks ``factor`` places apart, poison between."""
    pools = []
    for pool in (inputs.maxblocks, inputs.minblocks):
        wide = torch.full((len(pool) * factor, *pool.shape[1:]), float("nan"), dtype=pool.dtype)
        wide[::factor] = pool
        pools.append(wide)
    in_pool = (inputs.metadata_block_tables >= 0) & (
        inputs.metadata_block_tables < len(inputs.maxblocks)
    )
    tables = torch.where(
        in_pool, inputs.metadata_block_tables * factor, inputs.metadata_block_tables
    )
    return replace(inputs, maxblocks=pools[0], minblocks=pools[1], metadata_block_tables=tables)


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("target", runtime.simd_targets())
def test_select_from_many_short_blocks_at_every_target(target: str) -> None:
    """Metadata blocks taken in the order of the pool or, where they lie apart, side by side."""
    runtime.set_simd_target(target)
    seq_lens, known = [3000, 0, 2001, 1500, 7], [2200, 0, 0, 1497, 3]
    options: dict[str, Any] = {"block_size": 4, "rows": 3, "num_heads": 6}
    cases: list[dict[str, Any]] = [
        {"head_dim": 128, "num_kv_heads": 1, "metadata_seq_lens": known},
        {"head_dim": 64, "dtype": torch.float16, "layout": "heads_outside"},
        {"head_dim": 24, "dtype": torch.float32, "tokens_since_metadata_update": 30},
        {"head_dim": 33, "num_kv_heads": 6, "rows": 1, "layout": "unaligned"},
        {"head_dim": 40, "num_kv_heads": 3, "layout": "half_of_last", "metadata_seq_lens": known},
    ]
    for case in cases:
        for values in ("exact", "special"):
            inputs = gen_data_quest_block_select_paged(seq_lens, values=values, **(options | case))
            for wide in (inputs, spread(inputs, 6)):
                assert_select_matches_the_reference(wide, 20)


def test_select_shared_short_blocks() -> None:
    """Two requests with all their metadata blocks in common, in different orders."""
    inputs = gen_data_quest_block_select_paged([2000], block_size=4, rows=1, values="exact")
    blocks = inputs.metadata_block_tables[0, :500]
    tables = torch.stack([blocks, blocks.flip(0)])
    query = inputs.query.repeat(2, 1, 1)
    query[1] *= -1
    shared = replace(
        inputs, query=query, metadata_block_tables=tables, seq_lens=inputs.seq_lens.repeat(2)
    )
    assert_select_matches_the_reference(shared, 50)


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("target", runtime.simd_targets())
def test_large_rows_at_every_target(target: str) -> None:
    """Requests whose scores fill the candidates of a small k many times over."""
    runtime.set_simd_target(target)
    shape: dict[str, Any] = {"block_size": 1, "head_dim": 3, "num_heads": 2, "num_kv_heads": 1}
    for values, k in (("normal", 3), ("exact", 200), ("ties", 300), ("special", 1000)):
        # In one metadata block or many, with short requests between the long ones.
        for seq_lens, rows in (([40_000], 16), ([20_000, 5, 17_000, 300], 20_000)):
            inputs = gen_data_quest_block_select_paged(seq_lens, rows=rows, values=values, **shape)
            assert_select_matches_the_reference(inputs, k)

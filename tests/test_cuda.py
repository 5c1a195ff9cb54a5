"""The CUDA backend on a GPU: streams, graphs, memory, hostile values, agreement with the CPU.

What the operators compute is for the experiments and the property tests, with ``--device cuda``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from common.compare import assert_selection_matches, assert_written
from common.inputs import Operands
from common.layouts import CACHE_LAYOUTS, clone_with_storage, strided_copy
from gen_data_quest_block_select_paged import gen_data_quest_block_select_paged
from ref_quest_block_select_paged import quest_block_select_paged_ref
from select_attn_ops import (
    QuestDecoder,
    paged_select_attention,
    quest_block_select_paged,
    quest_block_select_paged_workspace_size,
    quest_prefill_metadata,
    runtime,
    selected_block_tables,
)


def why_not() -> str:
    """Return why the tests cannot run here; nothing where they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device on this machine"
    (backend,) = (each for each in runtime.backends() if each.name == "cuda")
    return "" if backend.available else f"no cuda backend: {backend.description}"


WHY_NOT = why_not()
needs_gpu = pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT or "there is one")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CYCLES = 1_000_000_000  # half a second or so of a GPU's time


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@dataclass
class Case(Operands):
    """What the three operators read and write in a step, in whole numbers: every sum is exact."""

    keys: torch.Tensor
    tables: torch.Tensor
    seq_lens: torch.Tensor
    metadata_tables: torch.Tensor
    query: torch.Tensor
    maxblocks: torch.Tensor
    minblocks: torch.Tensor
    selected: torch.Tensor
    block_ids: torch.Tensor
    token_counts: torch.Tensor

    def refill(self, other: Case) -> None:
        """Take over the values of another case of the same shapes."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def workspace(self) -> torch.Tensor:
        size = quest_block_select_paged_workspace_size(*self.select_arguments(), self.selected)
        return torch.zeros(size, dtype=torch.uint8, device=self.query.device)

    def select_arguments(self) -> tuple[torch.Tensor, ...]:
        return (self.query, self.maxblocks, self.minblocks, self.metadata_tables, self.seq_lens)

    def run(self, workspace: torch.Tensor | None = None, stream: int | None = None) -> None:
        quest_prefill_metadata(
            *(self.keys, self.tables, self.seq_lens, self.metadata_tables),
            *(self.maxblocks, self.minblocks),
            stream=stream,
        )
        quest_block_select_paged(
            *self.select_arguments(),
            out=self.selected,
            tokens_since_metadata_update=20,
            workspace=workspace,
            stream=stream,
        )
        selected_block_tables(
            *(self.selected, self.tables, self.seq_lens),
            block_size=self.keys.shape[1],
            out=self.block_ids,
            lens_out=self.token_counts,
            stream=stream,
        )

    def expected(self) -> Case:
        """Return what the CPU makes of it."""
        on_cpu = self.map(lambda tensor: tensor.cpu().contiguous().clone())
        on_cpu.run()
        return on_cpu

    def assert_is(self, expected: Case) -> None:
        for field in fields(self):
            actual, right = getattr(self, field.name).cpu(), getattr(expected, field.name)
            assert torch.equal(actual, right), field.name


def make_case(
    seed: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    block_size: int = 16,
    columns: int = 40,
    k: int = 12,
) -> Case:
    """Make a case on the CPU; all that depends on the seed are values."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def table(width: int) -> torch.Tensor:
        entries = torch.randperm(batch * width, generator=generator)
        return entries.view(batch, width).to(torch.int32)

    blocks = -(-columns // block_size)
    pool = (batch * blocks, block_size, num_kv_heads, head_dim)
    return Case(
        keys=numbers(-8, 8, batch * columns, block_size, num_kv_heads, head_dim).to(dtype),
        tables=table(columns),
        seq_lens=numbers(0, columns * block_size, batch).to(torch.int32),
        metadata_tables=table(blocks),
        query=(4 * numbers(-4, 4, batch, 4 * num_kv_heads, head_dim)).to(dtype),
        maxblocks=torch.full(pool, 5).to(dtype),
        minblocks=torch.full(pool, -5).to(dtype),
        selected=torch.full((batch, num_kv_heads, k), -77, dtype=torch.int32),
        block_ids=torch.full((batch, num_kv_heads, k), -77, dtype=torch.int32),
        token_counts=torch.full((batch, num_kv_heads), -77, dtype=torch.int32),
    )


@contextmanager
def no_synchronisation() -> Any:
    """Check that the block queues its work behind a kernel that is still running."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(CYCLES)
        slept = torch.cuda.Event()
        slept.record()
        yield
        assert not slept.query(), "the host waited"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


# --- without a GPU


def test_info_says_why_there_is_no_backend() -> None:
    (backend,) = (each for each in runtime.backends() if each.name == "cuda")
    if backend.available:
        assert "CUDA" in backend.description
    else:
        assert re.match("there is no |the driver is for CUDA |.*CUDA", backend.description)


# --- agreement with the CPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_every_layout_gives_what_the_cpu_gives(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    for head_dim in (8, 64, 72, 128, 200, 256):
        case = make_case(head_dim, dtype=dtype, head_dim=head_dim)
        moved = case.map(lambda tensor: strided_copy(tensor, layout, device=device))
        moved.run()
        moved.assert_is(case.expected())


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["normal", "unordered", "special", "ties"])
def test_selections_differ_only_where_scores_nearly_tie(
    values: str, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = gen_data_quest_block_select_paged(
        [60_000, 0, 4097, 31], num_heads=12, head_dim=96, dtype=dtype, values=values
    )
    reference = quest_block_select_paged_ref(*inputs.positional, 100, **inputs.keywords)
    moved = inputs.map(lambda tensor: tensor.to(device))
    for each in (inputs, moved):
        selected = quest_block_select_paged(*each.positional, 100, **each.keywords)
        assert_selection_matches(selected, reference)


@needs_gpu
def test_same_inputs_give_the_same_bits(device: torch.device) -> None:
    inputs = gen_data_quest_block_select_paged([30_000] * 5, values="normal", device=device)
    first = quest_block_select_paged(*inputs.positional, 500, **inputs.keywords)
    for _ in range(20):
        again = quest_block_select_paged(*inputs.positional, 500, **inputs.keywords)
        assert torch.equal(again, first)
    for b in range(5):
        alone = inputs.requests(b, b + 1)
        again = quest_block_select_paged(*alone.positional, 500, **alone.keywords)
        assert torch.equal(again, first[b : b + 1])


@needs_gpu
def test_pool_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    blocks, block_size, heads, head_dim = 2**13 + 3, 128, 16, 128
    if torch.cuda.mem_get_info(device)[0] < 3 * blocks * block_size * heads * head_dim * 2:
        pytest.skip("the device has not enough free memory")
    keys = torch.empty(blocks, block_size, heads, head_dim, dtype=torch.bfloat16, device=device)
    maxblocks, minblocks = torch.empty_like(keys), torch.empty_like(keys)
    table = torch.tensor([[blocks - 1, 0, blocks - 2]], dtype=torch.int32, device=device)
    for block, value in zip(table[0].tolist(), (3, 1, 2), strict=True):
        keys[block] = value
    metadata_table = torch.tensor([[blocks - 3]], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([3 * block_size], dtype=torch.int32, device=device)
    quest_prefill_metadata(keys, table, seq_lens, metadata_table, maxblocks, minblocks)
    assert maxblocks[blocks - 3, :4, 0, 0].tolist() == [3, 1, 2, 0]
    query = torch.ones(1, heads, head_dim, dtype=torch.bfloat16, device=device)
    selected = quest_block_select_paged(query, maxblocks, minblocks, metadata_table, seq_lens, k=4)
    assert selected[0, heads - 1].tolist() == [0, 2, 1, -1]


# --- hostile lengths and table entries

HOSTILE = (-1, -7, -(2**31), 2**31 - 1, 1 << 20)


def hostile_case(seed: int, dtype: torch.dtype) -> Case:
    """Make a case in which a tenth of all lengths and entries are anything."""
    case = make_case(seed, dtype=dtype, batch=9, block_size=3, columns=11, head_dim=16, k=7)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (case.tables, case.metadata_tables, case.seq_lens):
        where = torch.rand(tensor.shape, generator=generator) < 0.1
        drawn = torch.randint(len(HOSTILE), tensor.shape, generator=generator)
        tensor[where] = torch.tensor(HOSTILE, dtype=torch.int32)[drawn[where]]
    return case


def hostile_metadata(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pools that a device leaves, in the words of the contract."""
    block_size, columns = case.keys.shape[1], case.tables.shape[1]
    maxblocks, minblocks = case.maxblocks.clone(), case.minblocks.clone()
    for b, length in enumerate(case.seq_lens.tolist()):
        seq_len = min(max(length, 0), columns * block_size)
        total = -(-seq_len // block_size)
        for j in range(-(-total // block_size) * block_size):
            row = int(case.metadata_tables[b, j // block_size]), j % block_size
            if not 0 <= row[0] < len(maxblocks):
                continue
            maxblocks[row] = minblocks[row] = 0
            if j < total and 0 <= case.tables[b, j] < len(case.keys):
                valid = min(seq_len - j * block_size, block_size)
                keys = case.keys[case.tables[b, j], :valid]
                maxblocks[row], minblocks[row] = keys.amax(0), keys.amin(0)
    return maxblocks, minblocks


def hostile_selection(case: Case, tokens: int) -> torch.Tensor:
    """Return the selection that a device makes from the case's metadata."""
    block_size = case.keys.shape[1]
    batch, heads, k = case.selected.shape
    described = case.metadata_tables.shape[1] * block_size
    means = case.query.float().view(batch, heads, -1, case.query.shape[2]).mean(2)
    expected = torch.full_like(case.selected, -1)
    for b, length in enumerate(case.seq_lens.tolist()):
        seq_len = max(length, 0)
        total = -(-seq_len // block_size)
        window = 0 if tokens < 0 else max(seq_len - tokens, 0) // block_size
        forced = [] if tokens < 0 else list(range(total - 1, max(window - 1, total - k - 1), -1))
        if tokens >= 0 and window > 0 and total > 0:
            forced.append(0)
        end = total if tokens < 0 else window
        blocks = [j for j in range(min(end, described)) if j not in forced]
        rows = [(int(case.metadata_tables[b, j // block_size]), j % block_size) for j in blocks]
        for n in range(heads):
            scores = {
                j: float(
                    torch.maximum(
                        means[b, n] * case.maxblocks[row][n].float(),
                        means[b, n] * case.minblocks[row][n].float(),
                    ).sum()
                )
                for j, row in zip(blocks, rows, strict=True)
                if 0 <= row[0] < len(case.maxblocks)
            }
            ranked = (forced + sorted(scores, key=lambda j, s=scores: (-s[j], j)))[:k]
            expected[b, n, : len(ranked)] = torch.tensor(ranked, dtype=torch.int32)
    return expected


def hostile_tables(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a device makes of the case's selection."""
    block_size, columns = case.keys.shape[1], case.tables.shape[1]
    block_ids, token_counts = (
        torch.full_like(case.block_ids, -1),
        torch.zeros_like(case.token_counts),
    )
    for b, length in enumerate(case.seq_lens.tolist()):
        seq_len = max(length, 0)
        for n in range(block_ids.shape[1]):
            chosen = sorted(
                j
                for j in case.selected[b, n].tolist()
                if 0 <= j < min(-(-seq_len // block_size), columns) and case.tables[b, j] >= 0
            )
            block_ids[b, n, : len(chosen)] = case.tables[b, chosen]
            token_counts[b, n] = sum(min(seq_len - j * block_size, block_size) for j in chosen)
    return block_ids, token_counts


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_hostile_lengths_and_entries(seed: int, dtype: torch.dtype, device: torch.device) -> None:
    case = hostile_case(seed, dtype)
    layout = CACHE_LAYOUTS[seed]
    tokens = (-1, 0, 5, 100)[seed % 4]
    moved = case.map(lambda tensor: strided_copy(tensor, layout, device=device))
    before = moved.snapshot()

    def check(name: str, expected: torch.Tensor) -> None:
        assert_written(name, getattr(moved, name), getattr(before, name), expected)
        setattr(case, name, expected)

    quest_prefill_metadata(
        *(moved.keys, moved.tables, moved.seq_lens, moved.metadata_tables),
        *(moved.maxblocks, moved.minblocks),
    )
    for name, expected in zip(("maxblocks", "minblocks"), hostile_metadata(case), strict=True):
        check(name, expected)
    quest_block_select_paged(
        *moved.select_arguments(), out=moved.selected, tokens_since_metadata_update=tokens
    )
    check("selected", hostile_selection(case, tokens))
    # Numbers that no selection holds, too.
    case.selected[:, :, ::3] += 2
    case.selected[0] = torch.tensor(HOSTILE[:4], dtype=torch.int32)[torch.arange(7) % 4]
    moved.selected.copy_(case.selected)
    selected_block_tables(
        *(moved.selected, moved.tables, moved.seq_lens),
        block_size=case.keys.shape[1],
        out=moved.block_ids,
        lens_out=moved.token_counts,
    )
    for name, expected in zip(("block_ids", "token_counts"), hostile_tables(case), strict=True):
        check(name, expected)


@needs_gpu
def test_hostile_metadata_lengths(device: torch.device) -> None:
    """metadata_seq_lens is clamped to [0, seq_len]."""
    case = make_case(3, batch=5)
    known = torch.tensor([-1, -(2**31), 2**31 - 1, 100, 0], dtype=torch.int32)
    clamped = torch.minimum(known.clamp(min=0), case.seq_lens)
    results = []
    for each, lengths in ((case.map(lambda tensor: tensor.to(device)), known), (case, clamped)):
        lengths = lengths.to(each.query.device)
        quest_prefill_metadata(
            *(each.keys, each.tables, each.seq_lens, each.metadata_tables),
            *(each.maxblocks, each.minblocks),
            metadata_seq_lens=lengths,
        )
        quest_block_select_paged(
            *each.select_arguments(), out=each.selected, metadata_seq_lens=lengths
        )
        results.append([each.maxblocks.cpu(), each.minblocks.cpu(), each.selected.cpu()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


# --- streams


@needs_gpu
@pytest.mark.parametrize("explicit", [False, True], ids=["current_stream", "stream_argument"])
def test_side_stream(explicit: bool, device: torch.device) -> None:
    """The inputs arrive late: on another stream the work would be done before them."""
    case, fresh = (make_case(seed).map(lambda tensor: tensor.to(device)) for seed in (0, 1))
    workspace = case.workspace()
    case.run(workspace)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES // 10)
        case.refill(fresh)
        if not explicit:
            case.run(workspace)
    if explicit:
        case.run(workspace, stream=side.cuda_stream)
    side.synchronize()
    case.assert_is(fresh.expected())


@needs_gpu
def test_memory_of_a_call_belongs_to_its_stream(device: torch.device) -> None:
    """What a call on another stream takes by itself is nobody else's before it is done."""
    case = make_case(0).map(lambda tensor: tensor.to(device))
    case.run(case.workspace())
    expected = case.expected()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES // 10)
    selected = quest_block_select_paged(
        *case.select_arguments(),
        k=case.selected.shape[2],
        tokens_since_metadata_update=20,
        stream=side.cuda_stream,
    )
    size = quest_block_select_paged_workspace_size(*case.select_arguments(), case.selected)
    poison = [torch.full((size,), 255, dtype=torch.uint8, device=device) for _ in range(4)]
    side.synchronize()
    assert torch.equal(selected.cpu(), expected.selected)
    assert all(bool((each == 255).all()) for each in poison)


@needs_gpu
def test_workspace_at_any_address(device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    expected = case.expected()
    size = case.workspace().numel()
    for offset in (1, 2, 15):
        case.selected.fill_(-7)
        case.run(torch.zeros(size + offset, dtype=torch.uint8, device=device)[offset:])
        case.assert_is(expected)


@needs_gpu
@pytest.mark.parametrize("given_workspace", [True, False])
def test_concurrent_streams(given_workspace: bool, device: torch.device) -> None:
    cases = [make_case(seed, batch=3 + seed) for seed in range(4)]
    moved = [case.map(lambda tensor: tensor.to(device)) for case in cases]
    workspaces = [each.workspace() if given_workspace else None for each in moved]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in moved]
    for _ in range(50):
        for each, workspace, stream in zip(moved, workspaces, streams, strict=True):
            with torch.cuda.stream(stream):
                each.run(workspace)
    torch.cuda.synchronize()
    for each, case in zip(moved, cases, strict=True):
        each.assert_is(case.expected())


@needs_gpu
def test_concurrent_threads(device: torch.device) -> None:
    cases = [make_case(seed) for seed in range(4)]
    moved = [case.map(lambda tensor: tensor.to(device)) for case in cases]
    torch.cuda.synchronize()

    def work(each: Case) -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            workspace = each.workspace()
            for _ in range(50):
                each.run(workspace)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(each,)) for each in moved]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, case in zip(moved, cases, strict=True):
        each.assert_is(case.expected())


@needs_gpu
@pytest.mark.parametrize("given_workspace", [True, False])
def test_nothing_synchronises(given_workspace: bool, device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    workspace = case.workspace() if given_workspace else None
    case.run(workspace)  # loads the kernels
    with no_synchronisation():
        case.run(workspace)


# --- memory


@needs_gpu
def test_nothing_is_allocated(device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    workspace = case.workspace()
    case.run(workspace)
    torch.cuda.synchronize()

    def allocations() -> tuple[int, int]:
        stats = torch.cuda.memory_stats(device)
        return stats["allocation.all.allocated"], torch.cuda.mem_get_info(device)[0]

    before = allocations()
    for _ in range(10):
        case.run(workspace)
    assert allocations() == before


@needs_gpu
def test_one_workspace_serves_calls_of_all_shapes(device: torch.device) -> None:
    cases = [
        make_case(seed, batch=batch, columns=columns, num_kv_heads=heads, block_size=block_size)
        for seed, (batch, columns, heads, block_size) in enumerate(
            [(1, 700, 1, 2), (40, 3, 8, 16), (3, 100, 2, 4), (300, 2, 4, 16), (1, 700, 1, 2)]
        )
    ]
    moved = [case.map(lambda tensor: tensor.to(device)) for case in cases]
    workspace = max((each.workspace() for each in moved), key=len)
    for each, case in zip(moved, cases, strict=True):
        each.run(workspace)
        assert not workspace.any(), "it is not as it was"
        each.assert_is(case.expected())


@needs_gpu
def test_one_launch_per_call(device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    workspace = case.workspace()
    case.run(workspace)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        case.run(workspace)
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not on_device:
        pytest.skip("torch's profiler sees no kernels on this machine")
    assert len(on_device) == 3, on_device


# --- graphs


def capture(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    call()  # CUDA loads a kernel at its first launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@needs_gpu
@pytest.mark.parametrize("given_workspace", [True, False])
def test_graph_replays_with_other_lengths_and_tables(
    given_workspace: bool, device: torch.device
) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    case.seq_lens.fill_(1)  # what is captured does not depend on lengths
    workspace = case.workspace() if given_workspace else None
    graph = capture(lambda: case.run(workspace))
    for seed in range(1, 6):
        fresh = make_case(seed)
        if seed == 5:
            fresh.seq_lens.zero_()
        case.refill(fresh)
        graph.replay()
        case.assert_is(fresh.expected())


@needs_gpu
def test_graph_replays_beside_eager_calls(device: torch.device) -> None:
    cases = [make_case(seed) for seed in range(2)]
    replayed, eager = (case.map(lambda tensor: tensor.to(device)) for case in cases)
    workspaces = replayed.workspace(), eager.workspace()
    graph = capture(lambda: replayed.run(workspaces[0]))
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
        eager.run(workspaces[1])
    torch.cuda.synchronize()
    for each, case in zip((replayed, eager), cases, strict=True):
        each.assert_is(case.expected())


def decode(decoder: QuestDecoder, case: Case, out: torch.Tensor) -> None:
    decoder.step(case.query, case.tables, case.seq_lens, out=out)


def make_decoder(case: Case) -> QuestDecoder:
    keys = case.keys
    return QuestDecoder(
        keys,
        keys.flip(-1).contiguous(),
        num_heads=case.query.shape[1],
        k=6,
        max_batch=len(case.seq_lens),
        max_blocks=case.tables.shape[1],
    )


@needs_gpu
def test_decoder_in_a_graph(device: torch.device) -> None:
    """A captured step, replayed with other lengths, tables and queries, is the CPU's step."""
    case = make_case(0).map(lambda tensor: tensor.to(device))
    decoder = make_decoder(case)
    out = torch.empty_like(case.query)
    graph = capture(lambda: decode(decoder, case, out))
    for seed in range(1, 6):
        fresh = make_case(seed)
        fresh.keys.copy_(case.keys.cpu())  # the cache is the decoder's
        case.refill(fresh)
        on_cpu = make_decoder(fresh)
        for each, of in ((decoder, case), (on_cpu, fresh)):
            each.prefill(of.tables, (of.seq_lens - 1).clamp(min=0))
        graph.replay()
        expected = torch.empty_like(fresh.query)
        decode(on_cpu, fresh, expected)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)


@needs_gpu
def test_decoder_neither_allocates_nor_synchronises(device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    decoder = make_decoder(case)
    out = torch.empty_like(case.query)
    decode(decoder, case, out)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    with no_synchronisation():
        decode(decoder, case, out)
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == allocated


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_same_bits_in_any_batch(dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(0, dtype=dtype).map(lambda tensor: tensor.to(device))
    arguments = (case.query, case.keys, case.keys, case.tables, case.seq_lens)
    selected = torch.arange(20, dtype=torch.int32, device=device).expand(4, 2, 20)
    together = paged_select_attention(*arguments, selected)
    for b in range(4):
        query, tables, seq_lens = (arguments[i][b : b + 1] for i in (0, 3, 4))
        alone = paged_select_attention(
            query, case.keys, case.keys, tables, seq_lens, selected[b : b + 1]
        )
        assert torch.equal(alone, together[b : b + 1])


# --- several devices


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than 2 CUDA devices")
def test_two_devices() -> None:
    cases = [make_case(seed) for seed in range(2)]
    moved = [case.map(lambda tensor, i=i: tensor.to(f"cuda:{i}")) for i, case in enumerate(cases)]
    for current in (0, 1):
        with torch.cuda.device(current):
            for _ in range(20):
                for each in moved:
                    each.run()
                    assert torch.cuda.current_device() == current
    for i in (0, 1):
        torch.cuda.synchronize(i)
        moved[i].assert_is(cases[i].expected())


# --- torch.compile


@needs_gpu
def test_torch_compile(device: torch.device) -> None:
    @torch.compile(fullgraph=True)
    def step(
        keys: torch.Tensor,
        tables: torch.Tensor,
        seq_lens: torch.Tensor,
        metadata_tables: torch.Tensor,
        query: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        shape = (metadata_tables.numel(), *keys.shape[1:])
        maxblocks, minblocks = keys.new_zeros(shape), keys.new_zeros(shape)
        quest_prefill_metadata(keys, tables, seq_lens, metadata_tables, maxblocks, minblocks)
        selected = quest_block_select_paged(
            *(query * 2, maxblocks, minblocks, metadata_tables, seq_lens), k=12
        )
        tables, lens = selected_block_tables(selected, tables, seq_lens, block_size=keys.shape[1])
        return selected, tables, lens + 1

    def arguments(case: Case) -> tuple[torch.Tensor, ...]:
        return case.keys, case.tables, case.seq_lens, case.metadata_tables, case.query

    for seed in range(2):
        case = make_case(seed)
        actual = step(*arguments(case.map(lambda tensor: tensor.to(device))))
        for one, other in zip(actual, step(*arguments(case)), strict=True):
            assert torch.equal(one.cpu(), other)


# --- errors


@needs_gpu
@pytest.mark.parametrize("head_dim", [4, 100, 264])
def test_limit_of_the_head_dim(head_dim: int, device: torch.device) -> None:
    case = make_case(0, head_dim=head_dim).map(lambda tensor: tensor.to(device))
    text = f"head dim that is a multiple of 8 and at most 256, got {head_dim}"
    with pytest.raises(NotImplementedError, match=f"quest_prefill_metadata: .*{text}"):
        case.run()
    with pytest.raises(NotImplementedError, match=f"quest_block_select_paged: .*{text}"):
        quest_block_select_paged(*case.select_arguments(), k=1)


@needs_gpu
def test_limit_of_k(device: torch.device) -> None:
    case = make_case(0, k=2049).map(lambda tensor: tensor.to(device))
    text = "k to be at most 2048, got 2049"
    with pytest.raises(NotImplementedError, match=f"quest_block_select_paged: .*{text}"):
        case.run()
    with pytest.raises(NotImplementedError, match=f"selected_block_tables: .*{text}"):
        selected_block_tables(case.selected, case.tables, case.seq_lens, block_size=16)


@needs_gpu
def test_largest_k(device: torch.device) -> None:
    case = make_case(0, batch=2, columns=2100, block_size=4, head_dim=8, k=2048)
    moved = case.map(lambda tensor: tensor.to(device))
    moved.run()
    moved.assert_is(case.expected())


@needs_gpu
def test_devices_must_not_be_mixed(device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    case.seq_lens = case.seq_lens.cpu()
    with pytest.raises(ValueError, match=r"seq_lens must be on cuda:\d+ like k_cache, got cpu"):
        case.run()


@needs_gpu
def test_small_workspace(device: torch.device) -> None:
    case = make_case(0).map(lambda tensor: tensor.to(device))
    size = len(case.workspace())
    before = clone_with_storage(case.selected)
    with pytest.raises(ValueError, match=f"workspace must have at least {size} bytes"):
        quest_block_select_paged(
            *case.select_arguments(), out=case.selected, workspace=case.workspace()[1:]
        )
    assert torch.equal(case.selected, before)

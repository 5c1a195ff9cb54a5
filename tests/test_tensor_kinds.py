"""Unusual tensors, in memory and without: views, foreign descriptions of memory, traced outputs."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.compare import assert_attention_matches
from dlpack_tensors import ForeignTensor, NamespacedTensor, RawTensor
from gen_data_paged_select_attention import AttentionInputs, gen_data_paged_select_attention
from gen_data_quest_block_select_paged import SelectInputs, gen_data_quest_block_select_paged
from gen_data_quest_prefill_metadata import PrefillMetadataInputs, gen_data_quest_prefill_metadata
from gen_data_selected_block_tables import TablesInputs, gen_data_selected_block_tables
from ref_paged_select_attention import paged_select_attention_ref
from ref_quest_block_select_paged import quest_block_select_paged_ref
from ref_quest_prefill_metadata import quest_prefill_metadata_ref
from ref_selected_block_tables import selected_block_tables_ref
from select_attn_ops import (
    paged_select_attention,
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_prefill_metadata,
    selected_block_tables,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

BLOCK_SIZE, K = 16, 5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("aot_eager", "inductor")
Kind = Callable[[torch.Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prefill_inputs(**options: Any) -> PrefillMetadataInputs:
    return gen_data_quest_prefill_metadata([100, 16], **{"head_dim": 32, **options})


def select_inputs(**options: Any) -> SelectInputs:
    """Return whole numbers, so that the selection is exact."""
    options = {"values": "exact", "head_dim": 32, **options}
    return gen_data_quest_block_select_paged([700, 40], **options)


def tables_inputs() -> TablesInputs:
    return gen_data_selected_block_tables([100, 40], K, selection="scattered")


def attention_inputs(**options: Any) -> AttentionInputs:
    return gen_data_paged_select_attention([100, 40], K, **{"head_dim": 32, **options})


def assert_attended(out: Any, inputs: AttentionInputs) -> None:
    reference = paged_select_attention_ref(*inputs.positional)
    assert_attention_matches(torch.as_tensor(out).detach(), None, reference)


def expected_selection(inputs: SelectInputs) -> torch.Tensor:
    reference = quest_block_select_paged_ref(*inputs.positional, K, **inputs.keywords)
    assert all((error == 0).all() for error in reference.errors)
    return reference.indices


def assert_prefilled(inputs: PrefillMetadataInputs, before: PrefillMetadataInputs) -> None:
    positional, keywords = before.arguments()
    expected = quest_prefill_metadata_ref(*positional, **keywords)
    for actual, value in zip((inputs.maxblocks, inputs.minblocks), expected, strict=True):
        assert torch.equal(actual.detach(), value)


def assert_tables(results: Any, inputs: TablesInputs) -> None:
    expected = selected_block_tables_ref(*inputs.positional, block_size=BLOCK_SIZE)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(torch.as_tensor(result), value)


# torch tensors.


class Subclass(torch.Tensor):
    """A tensor of a class of its own."""


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


def slice_of_more(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in the middle of a tensor that has more in every dimension."""
    wide = torch.full([3 * size for size in tensor.shape], 7, dtype=tensor.dtype)
    view = wide[tuple(slice(size, 2 * size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


KINDS: dict[str, Kind] = {
    "subclass": lambda tensor: tensor.clone().as_subclass(Subclass),
    "inference": inference,
    "slice": slice_of_more,
    "buffer": lambda tensor: torch.nn.Buffer(tensor.clone()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_argument_of_a_kind(kind: str, dtype: torch.dtype) -> None:
    """Inputs, tables, lengths and outputs alike."""
    make = KINDS[kind]
    select = select_inputs(dtype=dtype)
    expected = expected_selection(select)
    assert torch.equal(quest_block_select_paged(*select.map(make).positional, K), expected)

    prefill = prefill_inputs(dtype=dtype)
    before = prefill.snapshot()
    prefill = prefill.map(make)
    positional, keywords = prefill.arguments()
    quest_prefill_metadata(*positional, **keywords)
    assert_prefilled(prefill, before)

    tables = tables_inputs()
    made = tables.map(make)
    assert_tables(selected_block_tables(*made.positional, block_size=BLOCK_SIZE), tables)

    attention = attention_inputs(dtype=dtype)
    assert_attended(paged_select_attention(*attention.map(make).positional), attention)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_of_a_kind(kind: str) -> None:
    inputs = select_inputs()
    out = KINDS[kind](torch.full((2, 2, K), -77, dtype=torch.int32))
    address = out.data_ptr()
    with torch.inference_mode(kind == "inference"):
        assert quest_block_select_paged(*inputs.positional, out=out) is out
    assert out.data_ptr() == address
    assert torch.equal(out, expected_selection(inputs))


def test_a_subclass_comes_back() -> None:
    inputs = select_inputs().map(KINDS["subclass"])
    assert type(quest_block_select_paged(*inputs.positional, K)) is Subclass


@pytest.mark.parametrize(("name", "shape"), [("out", (2, 2, K)), ("lens_out", (2, 2))])
def test_one_output_of_two(name: str, shape: tuple[int, ...]) -> None:
    inputs = tables_inputs()
    given = torch.empty(shape, dtype=torch.int32)
    results = selected_block_tables(*inputs.positional, block_size=BLOCK_SIZE, **{name: given})
    assert results[name == "lens_out"] is given
    assert_tables(results, inputs)


def test_pools_inside_one_allocation() -> None:
    inputs = prefill_inputs()
    before = inputs.snapshot()
    both = torch.stack([inputs.maxblocks, inputs.minblocks], 1)
    inputs.maxblocks, inputs.minblocks = both[:, 0], both[:, 1]
    quest_prefill_metadata(*inputs.arguments()[0])
    assert_prefilled(inputs, before)


# NumPy arrays and foreign tensors.


def test_memory_map(tmp_path: Path) -> None:
    """A pool in a file, mapped for reading only."""
    inputs = select_inputs(dtype=torch.float32)
    np.save(tmp_path / "maxblocks.npy", inputs.maxblocks.numpy())
    arguments = [tensor.numpy() for tensor in inputs.positional]
    arguments[1] = np.load(tmp_path / "maxblocks.npy", mmap_mode="r")
    result = quest_block_select_paged(*arguments, k=K)
    assert np.array_equal(result, expected_selection(inputs).numpy())


def test_arguments_are_given_back() -> None:
    """A call keeps no reference to an argument, whether it ends well or not."""
    inputs = select_inputs(dtype=torch.float32)
    arguments = [tensor.numpy() for tensor in inputs.positional]
    arguments[2].flags.writeable = False
    out = np.empty((2, 2, K), np.int32)
    held = [sys.getrefcount(array) for array in (*arguments, out)]
    for _ in range(3):
        quest_block_select_paged(*arguments, out=out)
    arguments[-1][0] = -1
    with pytest.raises(ValueError, match="seq_lens"):
        quest_block_select_paged(*arguments, out=out)
    gc.collect()
    assert [sys.getrefcount(array) for array in (*arguments, out)] == held


@pytest.mark.parametrize("kind", [ForeignTensor, RawTensor, NamespacedTensor])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_foreign_tensors(kind: type, dtype: torch.dtype) -> None:
    inputs, out = select_inputs(dtype=dtype), torch.empty(2, 2, K, dtype=torch.int32)
    quest_block_select_paged(*map(kind, inputs.positional), out=kind(out))
    assert torch.equal(out, expected_selection(inputs))

    prefill = prefill_inputs(dtype=dtype)
    before = prefill.snapshot()
    quest_prefill_metadata(*map(kind, prefill.arguments()[0]))
    assert_prefilled(prefill, before)

    tables = tables_inputs()
    outputs = torch.empty(2, 2, K, dtype=torch.int32), torch.empty(2, 2, dtype=torch.int32)
    selected_block_tables(
        *map(kind, tables.positional),
        block_size=BLOCK_SIZE,
        out=kind(outputs[0]),
        lens_out=kind(outputs[1]),
    )
    assert_tables(outputs, tables)

    attention = attention_inputs(dtype=dtype)
    attended, lse = torch.empty_like(attention.query), torch.empty(2, 8)
    paged_select_attention(*map(kind, attention.positional), out=kind(attended), lse=kind(lse))
    assert_attended(attended, attention)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_foreign_result_is_of_the_querys_type(dtype: torch.dtype) -> None:
    attention = attention_inputs(dtype=dtype)
    out = paged_select_attention(*map(NamespacedTensor, attention.positional))
    assert type(out) is NamespacedTensor
    assert out.tensor.dtype == dtype
    assert_attended(out.tensor, attention)


def test_a_foreign_result_of_a_type_that_numpy_lacks() -> None:
    attention = attention_inputs(dtype=torch.bfloat16)
    message = (
        "no tensor like a NamespacedTensor can be made (NumPy cannot take its type): "
        "pass the output"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        paged_select_attention(*map(NamespacedTensor, attention.positional))


def test_foreign_tensors_of_which_none_can_be_made() -> None:
    inputs, tables = select_inputs(), tables_inputs()
    message = r"^no tensor like a ForeignTensor can be made .*: pass the output$"
    with pytest.raises(TypeError, match=message):
        quest_block_select_paged(*map(ForeignTensor, inputs.positional), k=K)
    with pytest.raises(TypeError, match=message):
        selected_block_tables(*map(ForeignTensor, tables.positional), block_size=BLOCK_SIZE)


@pytest.mark.parametrize(
    "description",
    [
        *({"data_shift": -offset, "byte_offset": offset} for offset in (1, 2, 64, 4096)),
        {"no_strides": True},
    ],
    ids=str,
)
def test_descriptions_of_the_same_memory(description: dict[str, Any]) -> None:
    """byte_offset counts, and without strides a tensor is row-major."""
    inputs, out = select_inputs(), torch.empty(2, 2, K, dtype=torch.int32)
    arguments = [RawTensor(tensor, **description) for tensor in inputs.positional]
    quest_block_select_paged(*arguments, out=RawTensor(out, **description))
    assert torch.equal(out, expected_selection(inputs))


# Tensors without memory.


def test_meta_tensors_of_every_function() -> None:
    select = select_inputs().map(lambda tensor: tensor.to("meta"))
    out = torch.empty(2, 2, K, dtype=torch.int32, device="meta")
    assert quest_block_select_paged(*select.positional, out=out) is out
    assert quest_block_select_paged_in_out(*select.positional, out) is None
    assert quest_block_select_paged_in_out_w(*select.positional, 3, out) is None
    prefill = prefill_inputs(metadata_seq_lens=[40, 0]).map(lambda tensor: tensor.to("meta"))
    positional, keywords = prefill.arguments()
    assert quest_prefill_metadata(*positional, **keywords) is None


def test_fake_tensors_beyond_any_memory() -> None:
    with FakeTensorMode():
        pool = torch.empty(2**31, BLOCK_SIZE, 8, 128, dtype=torch.bfloat16)
        query = torch.empty(2**20, 32, 128, dtype=torch.bfloat16)
        table = torch.empty(2**20, 2**20, dtype=torch.int32)
        lens = torch.empty(2**20, dtype=torch.int32)
        result = quest_block_select_paged(query, pool, pool, table, lens, k=2**20)
        assert result.shape == (2**20, 8, 2**20)
        assert result.dtype == torch.int32
        assert quest_block_select_paged(query, pool, pool, table, lens, out=result) is result
        quest_block_select_paged_in_out_w(query, pool, pool, table, lens, 5, result)
        quest_prefill_metadata(pool, table, lens, table, pool, pool, metadata_seq_lens=lens)
        tables, tokens = selected_block_tables(result, table, lens, block_size=BLOCK_SIZE)
        assert tables.shape == result.shape
        assert tokens.shape == (2**20, 8)
        attended = paged_select_attention(query, pool, pool, table, lens, result)
        assert (attended.shape, attended.dtype) == (query.shape, query.dtype)


# torch.compile: each function between work that a compiler could move or fuse.


def run_select(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    return quest_block_select_paged(q * 2, x + 0, n, t, s + 0, K) + 1


def run_window(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    return quest_block_select_paged(q * 2, x, n, t, s, K, tokens_since_metadata_update=21) + 1


def run_known(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    return quest_block_select_paged(q, x, n, t, s, K, metadata_seq_lens=s - s // 3, block_size=16)


def run_out(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    out = torch.full((q.shape[0], x.shape[2], K), -77, dtype=torch.int32)
    return quest_block_select_paged(q, x, n, t, s, out=out) + out


def run_in_out(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    out = torch.full((q.shape[0], x.shape[2], K), -77, dtype=torch.int32)
    quest_block_select_paged_in_out(q, x, n, t, s, out)
    return out * 3


def run_in_out_w(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    out = torch.full((q.shape[0], x.shape[2], K), -77, dtype=torch.int32)
    quest_block_select_paged_in_out_w(q, x, n, t, s, 21, out)
    return out * 3


def run_flow(q: Any, x: Any, n: Any, t: Any, s: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Select, then make tables for the attention that follows."""
    selected = quest_block_select_paged(q, x, n, t, s, K)
    width = 16 * t.shape[1]
    every_block = torch.arange(width, dtype=torch.int32).expand(q.shape[0], width)
    return selected_block_tables(selected, every_block, s, block_size=16)


def run_attention(q: Any, x: Any, n: Any, t: Any, s: Any) -> torch.Tensor:
    """Select, then attend to the rows of metadata as if they were keys and values."""
    selected = quest_block_select_paged(q, x, n, t, s, K)
    tokens = torch.minimum(s, torch.full_like(s, 16 * t.shape[1]))
    blocks = torch.where(selected * 16 < tokens[:, None, None], selected, -1)
    keys, values = (pool.nan_to_num(0, 0, 0).clamp(-9, 9) for pool in (x, n))
    table = t.clamp(0, len(x) - 1)
    return paged_select_attention(q * 2, keys, values, table, tokens, blocks, scale=0.25) * 2


PROGRAMS = (
    run_select,
    run_window,
    run_known,
    run_out,
    run_in_out,
    run_in_out_w,
    run_flow,
    run_attention,
)


def assert_all_equal(actual: Any, expected: Any) -> None:
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_compiled(program: Callable[..., Any], dynamic: bool) -> None:
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seq_lens in ([700, 40], [90, 300]):
        inputs = gen_data_quest_block_select_paged(seq_lens, values="exact", head_dim=32)
        with inputs.unchanged():
            assert_all_equal(compiled(*inputs.positional), program(*inputs.positional))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_once_for_many_shapes(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(run_flow, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 5, 7):
        inputs = gen_data_quest_block_select_paged([300 + 16 * i for i in range(batch)])
        assert_all_equal(compiled(*inputs.positional), run_flow(*inputs.positional))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_the_callers_output(backend: str) -> None:
    """An output that is an argument of the compiled function is written in place."""

    def program(out: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        return quest_block_select_paged(*arguments, out=out)

    inputs, out = select_inputs(), torch.full((2, 2, K), -77, dtype=torch.int32)
    address = out.data_ptr()
    result = torch.compile(program, fullgraph=True, backend=backend)(out, *inputs.positional)
    assert torch.equal(out, expected_selection(inputs))
    assert torch.equal(result, out)
    assert out.data_ptr() == address


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_gradients_around_it(backend: str) -> None:
    """A selection inside a differentiated program is a constant to it."""

    def program(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        selected = quest_block_select_paged(q.detach(), *others, K)
        return (q.sum((1, 2)) * selected[:, 0, 0]).sum()

    inputs = select_inputs(dtype=torch.float32)
    grads = []
    for function in (program, torch.compile(program, fullgraph=True, backend=backend)):
        inputs.query = inputs.query.detach().requires_grad_()
        function(*inputs.positional).backward()
        grads.append(inputs.query.grad)
    assert torch.equal(*grads)


def test_compiled_errors_are_the_same() -> None:
    """What is wrong with the values shows when the compiled function runs."""
    inputs = select_inputs()
    compiled = torch.compile(run_select, fullgraph=True, backend="aot_eager")
    compiled(*inputs.positional)
    inputs.seq_lens[1] = -1
    with pytest.raises(ValueError, match=r"^seq_lens\[1\] must be at least 0, got -1$"):
        compiled(*inputs.positional)

"""Whose tensors go in, whose come out, and what the frameworks see of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import select_attn_ops
import torch
from dlpack_tensors import ForeignTensor, NamespacedTensor
from select_attn_ops import (
    _torch_ops,
    merge_attention_states,
    paged_select_attention,
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_prefill_metadata,
    selected_block_tables,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, K = 2, 8, 4, 32, 16, 3
SINCE = "tokens_since_metadata_update"
OPERATORS = [
    quest_prefill_metadata,
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    selected_block_tables,
    paged_select_attention,
]


@dataclass
class Data:
    """One paged batch with its metadata."""

    k_cache: Any
    block_tables: Any
    seq_lens: Any
    metadata_block_tables: Any
    maxblocks: Any
    minblocks: Any
    query: Any

    def map(self, convert: Callable[[torch.Tensor], Any]) -> Data:
        return Data(**{name: convert(value) for name, value in vars(self).items()})

    def prefill(self, **options: Any) -> None:
        quest_prefill_metadata(
            self.k_cache,
            self.block_tables,
            self.seq_lens,
            self.metadata_block_tables,
            self.maxblocks,
            self.minblocks,
            **options,
        )

    def select_arguments(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.maxblocks,
            self.minblocks,
            self.metadata_block_tables,
            self.seq_lens,
        )

    def attend(self, selected: Any, **options: Any) -> Any:
        """Attend with the keys for values."""
        tables = (self.block_tables, self.seq_lens, selected)
        return paged_select_attention(self.query, self.k_cache, self.k_cache, *tables, **options)


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    metadata_shape = (BATCH, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    made = Data(
        k_cache=torch.randn(20, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, generator=generator),
        block_tables=torch.randperm(20, generator=generator).int().view(BATCH, 10),
        seq_lens=torch.tensor([150, 33], dtype=torch.int32),
        metadata_block_tables=torch.tensor([[1], [0]], dtype=torch.int32),
        maxblocks=torch.zeros(metadata_shape),
        minblocks=torch.zeros(metadata_shape),
        query=torch.randn(BATCH, NUM_HEADS, HEAD_DIM, generator=generator),
    )
    made.prefill()
    return made


def to_bfloat16(data: Data) -> Data:
    return data.map(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)


def expected_selection(data: Data) -> list[Any]:
    return quest_block_select_paged(*data.select_arguments(), K).tolist()


# --- torch


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "convert",
    [
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: tensor.requires_grad_() * 1,
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.as_subclass(Subclass),
        lambda tensor: torch.stack([tensor, tensor], 1)[:, 1],
        lambda tensor: tensor.pin_memory() if torch.cuda.is_available() else tensor,
    ],
    ids=["requires_grad", "non-leaf", "Parameter", "subclass", "slice", "pinned"],
)
def test_torch_inputs(data: Data, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    expected = expected_selection(data)
    other = data.map(lambda tensor: convert(tensor) if tensor.is_floating_point() else tensor)
    other.maxblocks, other.minblocks = (torch.zeros_like(data.maxblocks) for _ in range(2))
    other.prefill()
    selected = quest_block_select_paged(*other.select_arguments(), K)
    assert isinstance(selected, torch.Tensor)
    assert selected.tolist() == expected
    assert not selected.requires_grad
    attended = other.attend(selected)
    assert isinstance(attended, torch.Tensor)
    assert torch.equal(attended.detach(), data.map(torch.Tensor.detach).attend(selected))
    assert not attended.requires_grad


def test_inference_mode(data: Data) -> None:
    expected = expected_selection(data)
    with torch.inference_mode():
        selected = quest_block_select_paged(*data.select_arguments(), K)
        assert selected.tolist() == expected
        attended = data.attend(selected)
    assert torch.equal(attended, data.attend(selected))


def test_backward_raises(data: Data) -> None:
    data.query.requires_grad_()
    selected = quest_block_select_paged(*data.select_arguments(), K)
    with pytest.raises(RuntimeError, match="does not require grad"):
        selected.sum().backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        data.attend(selected).sum().backward()


def test_backward_raises_under_compile(data: Data) -> None:
    @torch.compile(fullgraph=True)
    def step(query: torch.Tensor) -> torch.Tensor:
        return quest_block_select_paged(query, *data.select_arguments()[1:], K).float() * 2

    with pytest.raises(RuntimeError, match="does not require grad"):
        step(data.query.requires_grad_()).sum().backward()


def test_backward_of_attention_raises_under_compile(data: Data) -> None:
    selected = quest_block_select_paged(*data.select_arguments(), K)

    @torch.compile(fullgraph=True)
    def step(query: torch.Tensor) -> torch.Tensor:
        return replace(data, query=query).attend(selected) * 2

    with pytest.raises(RuntimeError, match="does not require grad"):
        step(data.query.requires_grad_()).sum().backward()


def test_outputs_are_the_callers(data: Data) -> None:
    expected = expected_selection(data)
    wide = torch.full((BATCH, NUM_KV_HEADS, 2 * K), 77, dtype=torch.int32)
    out = wide[:, :, K:]
    assert quest_block_select_paged(*data.select_arguments(), out=out) is out
    assert wide[:, :, K:].tolist() == expected
    assert (wide[:, :, :K] == 77).all()

    tables, lens = torch.empty_like(out), torch.empty(BATCH, NUM_KV_HEADS, dtype=torch.int32)
    returned = selected_block_tables(
        out, data.block_tables, data.seq_lens, block_size=BLOCK_SIZE, out=tables, lens_out=lens
    )
    assert returned[0] is tables
    assert returned[1] is lens

    lse = torch.empty(BATCH, NUM_HEADS)
    attended = torch.empty_like(data.query)
    assert data.attend(out, out=attended, lse=lse) is attended
    assert torch.equal(attended, data.attend(out))
    assert lse.isfinite().all()


def test_written_tensors_have_a_new_version(data: Data) -> None:
    """Else autograd would silently use values that are no longer there."""
    weight = torch.ones_like(data.maxblocks, requires_grad=True)
    result = (data.maxblocks * weight).sum()
    data.prefill()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def call_with_every_output(data: Data) -> list[torch.Tensor]:
    """Return the outputs of a call of every operator; the selections are all the same."""
    arguments = data.select_arguments()
    outs = [torch.zeros(BATCH, NUM_KV_HEADS, K, dtype=torch.int32) for _ in range(4)]
    lens = torch.zeros(BATCH, NUM_KV_HEADS, dtype=torch.int32)
    metadata = data.maxblocks.clone(), data.minblocks.clone()
    replace(data, maxblocks=metadata[0], minblocks=metadata[1]).prefill()
    quest_block_select_paged(*arguments, out=outs[0])
    quest_block_select_paged_in_out(*arguments, outs[1])
    quest_block_select_paged_in_out_w(*arguments, -1, outs[2])
    selected_block_tables(
        outs[0], data.block_tables, data.seq_lens, block_size=16, out=outs[3], lens_out=lens
    )
    attended, lse = torch.zeros_like(data.query), torch.zeros(BATCH, NUM_HEADS)
    data.attend(outs[0], out=attended.detach(), lse=lse)
    return [*metadata, *outs, lens, attended, lse]


@pytest.mark.parametrize("convert", [torch.Tensor.clone, torch.nn.Buffer, torch.nn.Parameter])
@pytest.mark.parametrize("inference", [False, True])
def test_usual_calls_go_straight_to_the_library(
    data: Data, convert: Any, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_selection(data)
    data.query = convert(data.query)

    def long_way(tensors: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(_torch_ops, "takes_over", long_way)
    with torch.inference_mode(inference):
        outputs = call_with_every_output(data)
        assert all(out.tolist() == expected for out in outputs[2:5])
        data.prefill(metadata_seq_lens=data.seq_lens - 20)
        known = {"metadata_seq_lens": data.seq_lens, "block_size": BLOCK_SIZE, "stream": 0}
        workspace = torch.zeros(64, dtype=torch.uint8)
        quest_block_select_paged(*data.select_arguments(), K, **known, workspace=workspace)
        selected_block_tables(outputs[2], data.block_tables, data.seq_lens, block_size=BLOCK_SIZE)
        data.attend(outputs[2], scale=0.5, workspace=workspace, stream=0)


@pytest.mark.parametrize("straight", [False, True])
def test_a_call_is_one_new_version(
    data: Data, straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not straight:
        monkeypatch.setattr(_torch_ops, "call_directly", lambda *_: False)
    assert [out._version for out in call_with_every_output(data)] == [1] * 9


def test_an_error_is_no_new_version_and_has_no_other_behind_it(data: Data) -> None:
    out = torch.zeros(BATCH, NUM_KV_HEADS, K, dtype=torch.int32)
    data.seq_lens[1] = -1
    with pytest.raises(ValueError, match=r"^seq_lens\[1\] must be at least 0, got -1$") as caught:
        quest_block_select_paged(*data.select_arguments(), out=out)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert out._version == 0


def test_outputs_must_not_require_grad(data: Data) -> None:
    data.maxblocks.requires_grad_()
    with pytest.raises(ValueError, match=r"^maxblocks is written and must not require grad$"):
        data.prefill()
    with torch.no_grad():
        data.prefill()


# --- NumPy and others


def test_numpy(data: Data) -> None:
    arrays = data.map(lambda tensor: tensor.numpy().copy())
    arrays.maxblocks[:] = arrays.minblocks[:] = np.nan
    for name in ("k_cache", "block_tables", "seq_lens", "metadata_block_tables", "query"):
        getattr(arrays, name).flags.writeable = False  # inputs may be
    arrays.prefill()
    np.testing.assert_array_equal(arrays.maxblocks, data.maxblocks.numpy())
    arrays.maxblocks.flags.writeable = False
    selected = quest_block_select_paged(*arrays.select_arguments(), K)
    assert type(selected) is np.ndarray
    assert selected.dtype == np.int32
    assert selected.tolist() == expected_selection(data)
    tables, lens = selected_block_tables(
        selected, arrays.block_tables, arrays.seq_lens, block_size=BLOCK_SIZE
    )
    assert type(tables) is type(lens) is np.ndarray
    lse = np.empty((BATCH, NUM_HEADS), np.float32)
    attended = arrays.attend(selected, lse=lse)
    assert type(attended) is np.ndarray
    expected = data.attend(torch.from_numpy(selected))
    np.testing.assert_array_equal(attended, expected.numpy())
    out, again = merge_attention_states([attended, attended], [lse, lse])
    assert type(out) is type(again) is np.ndarray
    np.testing.assert_allclose(out, attended, rtol=1e-6)
    np.testing.assert_allclose(again, lse + np.log(2), rtol=1e-6)


def test_numpy_writes_in_place(data: Data) -> None:
    wide = np.full((BATCH, NUM_KV_HEADS, 2 * K), 77, np.int32)
    out = wide[::-1, :, :K]  # backwards
    arrays = data.map(lambda tensor: tensor.numpy())
    assert quest_block_select_paged(*arrays.select_arguments(), out=out) is out
    assert wide[::-1, :, :K].tolist() == expected_selection(data)
    assert (wide[:, :, K:] == 77).all()


def test_array_api(data: Data) -> None:
    arrays = data.map(NamespacedTensor)
    selected = quest_block_select_paged(*arrays.select_arguments(), K)
    assert type(selected) is NamespacedTensor
    assert selected.tensor.tolist() == expected_selection(data)
    tables, lens = selected_block_tables(
        selected, arrays.block_tables, arrays.seq_lens, block_size=BLOCK_SIZE
    )
    assert type(tables) is type(lens) is NamespacedTensor
    attended = arrays.attend(selected)
    assert type(attended) is NamespacedTensor
    assert torch.equal(attended.tensor, data.attend(selected.tensor))


def test_bare_dlpack(data: Data) -> None:
    expected = expected_selection(data)
    tensors = data.map(ForeignTensor)
    tensors.prefill()
    out = torch.empty(BATCH, NUM_KV_HEADS, K, dtype=torch.int32)
    foreign = ForeignTensor(out)
    assert quest_block_select_paged(*tensors.select_arguments(), out=foreign) is foreign
    assert out.tolist() == expected
    attended = torch.empty_like(data.query)
    tensors.attend(foreign, out=ForeignTensor(attended))
    assert torch.equal(attended, data.attend(out))


def test_frameworks_may_be_mixed(data: Data) -> None:
    mixed = replace(data, maxblocks=data.maxblocks.numpy(), seq_lens=data.seq_lens.numpy())
    selected = quest_block_select_paged(*mixed.select_arguments(), K)
    assert selected.tolist() == expected_selection(data)


@pytest.mark.parametrize("empty", [np.empty, torch.empty], ids=["numpy", "torch"])
def test_empty_batch(data: Data, empty: Callable[..., Any]) -> None:
    int32 = np.int32 if empty is np.empty else torch.int32
    float32 = np.float32 if empty is np.empty else torch.float32
    keys = empty((0, 16, 2, 8), dtype=float32)
    table, lens = empty((0, 4), dtype=int32), empty((0,), dtype=int32)
    quest_prefill_metadata(keys, table, lens, table, keys, empty((0, 16, 2, 8), dtype=float32))
    query = empty((0, 4, 8), dtype=float32)
    selected = quest_block_select_paged(query, keys, keys, table, lens, k=3)
    assert tuple(selected.shape) == (0, 2, 3)
    tables, counts = selected_block_tables(selected, table, lens, block_size=16)
    assert tuple(tables.shape) == (0, 2, 3)
    assert tuple(counts.shape) == (0, 2)
    attended = paged_select_attention(query, keys, keys, table, lens, selected)
    assert tuple(attended.shape) == (0, 4, 8)


def test_shifted_overlap_is_refused() -> None:
    """Else one row's physical blocks would become another row's block numbers."""
    buffer = torch.zeros(5, 1, 4, dtype=torch.int32)
    message = r"^out is written and must not share memory with selected_indices, got overlapping"
    with pytest.raises(ValueError, match=message):
        selected_block_tables(
            buffer[:4],
            torch.full((4, 1), 2**30, dtype=torch.int32),
            torch.ones(4, dtype=torch.int32),
            block_size=16,
            out=buffer[1:],
        )
    assert not buffer.any()


# --- torch.compile, export and fake tensors


def decode_step(
    data: Data, k: int, since: int, metadata_seq_lens: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Every operator in every form, writing into the metadata of ``data``."""
    data.prefill(metadata_seq_lens=metadata_seq_lens)
    selected = quest_block_select_paged(
        *data.select_arguments(), k, metadata_seq_lens=metadata_seq_lens
    )
    windowed = quest_block_select_paged(
        *data.select_arguments(), k, tokens_since_metadata_update=since, block_size=BLOCK_SIZE
    )
    out, out_w, out_again = (torch.empty_like(selected) for _ in range(3))
    quest_block_select_paged_in_out(*data.select_arguments(), out)
    quest_block_select_paged_in_out_w(*data.select_arguments(), since, out_w)
    returned = quest_block_select_paged(*data.select_arguments(), out=out_again)
    tables, lens = selected_block_tables(
        windowed, data.block_tables, data.seq_lens, block_size=BLOCK_SIZE
    )
    lse = torch.empty(data.query.shape[:2])
    attended = data.attend(windowed, scale=0.25, lse=lse)
    again = data.attend(selected, out=torch.empty_like(attended))
    merged = merge_attention_states([attended, attended], [lse, lse])
    return (
        *(selected, windowed, out, out_w, returned + 1, tables, lens),
        *(attended, lse, again * 2, *merged),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ranged", [False, True])
def test_compile_full_graph(data: Data, dynamic: bool, ranged: bool) -> None:
    torch._dynamo.reset()
    data = to_bfloat16(data)
    metadata_seq_lens = data.seq_lens - 20 if ranged else None
    compiled = torch.compile(decode_step, fullgraph=True, dynamic=dynamic)
    for k in (2, 5):
        eager_data, compiled_data = (data.map(torch.clone) for _ in range(2))
        for other in (eager_data, compiled_data):
            other.maxblocks.fill_(7)
        eager = decode_step(eager_data, k, 4, metadata_seq_lens)
        for expected, got in zip(
            eager, compiled(compiled_data, k, 4, metadata_seq_lens), strict=True
        ):
            assert torch.equal(got, expected)
        assert torch.equal(compiled_data.maxblocks, eager_data.maxblocks)


def test_compile_does_not_depend_on_the_values_of_integers(data: Data) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(query: torch.Tensor, since: int) -> torch.Tensor:
        return quest_block_select_paged(query, *data.select_arguments()[1:], K, **{SINCE: since})

    for since in range(-1, 40):  # far beyond the number of graphs that torch makes of a function
        eager = quest_block_select_paged(*data.select_arguments(), K, **{SINCE: since})
        assert torch.equal(step(data.query, since), eager)


def test_numpy_calls_while_another_thread_compiles(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of itself then holds for the whole process."""
    expected = expected_selection(data)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    arrays = data.map(lambda tensor: tensor.numpy())
    assert quest_block_select_paged(*arrays.select_arguments(), K).tolist() == expected


def test_make_fx_sees_the_operator(data: Data) -> None:
    def step(query: torch.Tensor) -> torch.Tensor:
        return quest_block_select_paged(query, *data.select_arguments()[1:], K)

    graph = make_fx(step)(torch.zeros_like(data.query))
    assert graph(data.query).tolist() == expected_selection(data)


def test_jit_trace_sees_the_operator(data: Data) -> None:
    def step(query: torch.Tensor) -> torch.Tensor:
        return quest_block_select_paged(query, *data.select_arguments()[1:], K)

    traced = torch.jit.trace(step, torch.zeros_like(data.query))
    assert traced(data.query).tolist() == expected_selection(data)


def test_dispatch_mode_sees_the_operators(data: Data) -> None:
    """Plain tensors, but somebody who wants to see what becomes of them."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            seen.append(op.namespace + "." + op.__name__)
            return op(*args, **kwargs or {})

    with Mode():
        call_with_every_output(data)
    ours = [name.split(".")[1] for name in seen if name.startswith("select_attn_ops.")]
    names = ["quest_prefill_metadata", *3 * ["quest_block_select_paged"]]
    assert ours == [*names, "selected_block_tables", "paged_select_attention"]


def test_torch_without_a_private_function(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has one of them no more costs time, not the import or the result."""
    missing = _torch_ops._private("_C._no_such_function")
    assert missing()
    monkeypatch.setattr(_torch_ops, "_functorch_stack", missing)
    assert not _torch_ops.call_directly(lambda: None, (), (data.query,), ())
    assert quest_block_select_paged(*data.select_arguments(), K).tolist() == (
        expected_selection(data)
    )


def test_vmap_is_an_error(data: Data) -> None:
    def step(query: torch.Tensor) -> torch.Tensor:
        return quest_block_select_paged(query, *data.select_arguments()[1:], K)

    with pytest.raises(RuntimeError, match="Batching rule not implemented for select_attn_ops::"):
        torch.func.vmap(step)(data.query[None])


def test_fake_tensor_among_others_is_an_error(data: Data) -> None:
    lens = FakeTensorMode().from_tensor(torch.zeros(BATCH + 3, dtype=torch.int32))[3:]
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        quest_block_select_paged(*data.select_arguments(), K, metadata_seq_lens=lens)


def test_export(data: Data) -> None:
    class Step(torch.nn.Module):
        def forward(self, query: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
            return quest_block_select_paged(
                query, data.maxblocks, data.minblocks, data.metadata_block_tables, seq_lens, K
            )

    program = torch.export.export(Step(), (data.query, data.seq_lens))
    assert program.module()(data.query, data.seq_lens).tolist() == expected_selection(data)


def opcheck_cases(data: Data) -> list[tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.select_attn_ops
    out = torch.zeros(BATCH, NUM_KV_HEADS, K, dtype=torch.int32)
    lens = torch.zeros(BATCH, NUM_KV_HEADS, dtype=torch.int32)
    workspace = torch.zeros(64, dtype=torch.uint8)
    metadata = (data.maxblocks, data.minblocks)
    prefill = (data.k_cache, data.block_tables, data.seq_lens, data.metadata_block_tables)
    select = data.select_arguments()
    wide = torch.zeros(BATCH, NUM_KV_HEADS, 2 * K, dtype=torch.int32)
    attended, lse = torch.zeros(data.query.shape), torch.zeros(BATCH, NUM_HEADS)
    cache = (data.query, data.k_cache, data.k_cache)
    attention = (*cache, data.block_tables, data.seq_lens, out, attended)
    return [
        (ops.quest_prefill_metadata, (*prefill, *metadata, None, None)),
        (ops.quest_prefill_metadata, (*prefill, *metadata, data.seq_lens - 20, None)),
        (ops.quest_block_select_paged, (*select, out, -1, None, None, None, None)),
        (ops.quest_block_select_paged, (*select, out, 3, None, BLOCK_SIZE, workspace, None)),
        (ops.quest_block_select_paged, (*select, wide[..., :K], -1, data.seq_lens, 16, None, None)),
        (
            ops.selected_block_tables,
            (out, data.block_tables, data.seq_lens, 16, torch.zeros_like(out), lens, None),
        ),
        (ops.paged_select_attention, (*attention, None, None, None, None)),
        (ops.paged_select_attention, (*attention, 0.5, lse, workspace, None)),
    ]


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(data: Data, case: int, requires_grad: bool) -> None:
    if requires_grad:
        data.query.requires_grad_()
        data.k_cache.requires_grad_()
    op, arguments = opcheck_cases(data)[case]
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_meta_and_fake_tensors_give_shapes(data: Data) -> None:
    meta = data.map(lambda tensor: tensor.to("meta"))
    meta.prefill()
    selected = quest_block_select_paged(*meta.select_arguments(), K)
    assert selected.is_meta
    assert selected.shape == (BATCH, NUM_KV_HEADS, K)
    tables, lens = selected_block_tables(selected, meta.block_tables, meta.seq_lens, block_size=16)
    assert (tables.shape, lens.shape) == ((BATCH, NUM_KV_HEADS, K), (BATCH, NUM_KV_HEADS))
    attended = meta.attend(selected)
    assert attended.is_meta
    assert (attended.shape, attended.dtype) == (meta.query.shape, meta.query.dtype)

    mode = FakeTensorMode()
    fake = data.map(mode.from_tensor)
    with mode:
        fake.prefill()
        selected = quest_block_select_paged(*fake.select_arguments(), K)
        assert selected.shape == (BATCH, NUM_KV_HEADS, K)
        assert fake.attend(selected).shape == fake.query.shape


# --- what a user reads


@pytest.mark.parametrize("function", OPERATORS, ids=lambda function: function.__name__)
def test_help_is_complete(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function)
    assert text is not None
    for section in ("Parameters", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    for name in inspect.signature(function).parameters:
        assert name in text
    for fact in ("int32", "float16, bfloat16 or float32", "[B", "ValueError", "TypeError"):
        if function is not selected_block_tables or not fact.startswith("float"):
            assert fact in text


@pytest.mark.parametrize(
    "fact", ["*Order.*", "*Ties.*", "*Padding.*", "*Limits.*", "ICML 2024", "-1"]
)
def test_help_of_the_selection(fact: str) -> None:
    assert fact in (inspect.getdoc(quest_block_select_paged) or "")


def test_names_are_exported() -> None:
    assert {function.__name__ for function in OPERATORS} <= set(select_attn_ops.__all__)

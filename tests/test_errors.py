"""Every error of the contract, by its full text, and that none leaves anything written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import select_attn_ops
import torch
from dlpack_tensors import CUDA, CUDA_HOST, EXT_DEV, METAL, ForeignTensor, RawTensor
from error_texts import is_documented, raised_texts
from memory import snapshot
from select_attn_ops import (
    merge_attention_states,
    paged_select_attention,
    paged_select_attention_workspace_size,
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_block_select_paged_workspace_size,
    quest_prefill_metadata,
    runtime,
    selected_block_tables,
)

POISON = -77
GARBAGE = 2**31 - 1
Arguments = dict[str, Any]
Change = Callable[[Any], Any]


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def poison(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype)


def prefill_arguments() -> Arguments:
    """Return requests of 3 and 2 blocks of 4 tokens; 2 metadata rows per metadata block."""
    return {
        "k_cache": floats(6, 4, 2, 8),
        "block_tables": int32([[2, 0, 5], [3, 1, GARBAGE]]),
        "seq_lens": int32([9, 8]),
        "metadata_block_tables": int32([[2, 0], [3, GARBAGE]]),
        "maxblocks": poison(4, 2, 2, 8, dtype=torch.float16),
        "minblocks": poison(4, 2, 2, 8, dtype=torch.float16),
        "metadata_seq_lens": int32([0, 0]),
    }


def select_arguments() -> Arguments:
    """Return requests of 2 and 3 blocks of 2 tokens; 2 metadata rows per metadata block."""
    return {
        "query": floats(2, 6, 8),
        "maxblocks": floats(4, 2, 2, 8),
        "minblocks": floats(4, 2, 2, 8),
        "metadata_block_tables": int32([[2, GARBAGE], [3, 0]]),
        "seq_lens": int32([3, 6]),
    }


def tables_arguments() -> Arguments:
    """Return requests of 3 and 2 blocks of 4 tokens."""
    return {
        "selected_indices": int32([[[2, 0, -1], [1, -1, 0]], [[1, 0, -1], [-1, -1, -1]]]),
        "block_tables": int32([[2, 0, 5], [3, 1, -GARBAGE]]),
        "seq_lens": int32([9, 8]),
        "block_size": 4,
        "out": poison(2, 2, 3),
        "lens_out": poison(2, 2),
    }


def attention_arguments() -> Arguments:
    """Return requests of 3 and 2 blocks of 4 tokens; 3 query heads per KV head."""
    return {
        "query": floats(2, 6, 8),
        "k_cache": floats(6, 4, 2, 8),
        "v_cache": floats(6, 4, 2, 8),
        "block_tables": int32([[2, 0, 5], [3, 1, GARBAGE]]),
        "seq_lens": int32([9, 8]),
        "selected_indices": int32([[[2, 0, -1], [1, -1, 0]], [[1, 0, -1], [-1, -1, -1]]]),
    }


def attention_outputs() -> Arguments:
    return {
        "out": poison(2, 6, 8, dtype=torch.float16),
        "lse": poison(2, 6, dtype=torch.float32),
        "workspace": torch.zeros(64, dtype=torch.uint8),
    }


@dataclass(frozen=True)
class Entry:
    """A public function and how to call it; every tensor among the arguments is by name."""

    function: Callable[..., Any]
    arguments: Callable[[], Arguments]


WINDOW = {"tokens_since_metadata_update": -1}
ENTRIES = {
    "prefill": Entry(quest_prefill_metadata, prefill_arguments),
    "k": Entry(quest_block_select_paged, lambda: {**select_arguments(), "k": 3}),
    "out": Entry(quest_block_select_paged, lambda: {**select_arguments(), "out": poison(2, 2, 3)}),
    "known": Entry(
        quest_block_select_paged,
        lambda: {
            **select_arguments(),
            "metadata_seq_lens": int32([3, 6]),
            "out": poison(2, 2, 3),
            "workspace": torch.zeros(64, dtype=torch.uint8),
        },
    ),
    "in_out": Entry(
        quest_block_select_paged_in_out,
        lambda: {**select_arguments(), "selected_indices": poison(2, 2, 3)},
    ),
    "in_out_w": Entry(
        quest_block_select_paged_in_out_w,
        lambda: {**select_arguments(), **WINDOW, "selected_indices": poison(2, 2, 3)},
    ),
    "workspace_size": Entry(
        quest_block_select_paged_workspace_size,
        lambda: {**select_arguments(), "out": poison(2, 2, 3)},
    ),
    "tables": Entry(selected_block_tables, tables_arguments),
    "attention": Entry(
        paged_select_attention, lambda: {**attention_arguments(), **attention_outputs()}
    ),
    "attention_new": Entry(paged_select_attention, attention_arguments),
    "attention_size": Entry(
        paged_select_attention_workspace_size,
        lambda: {**attention_arguments(), "out": attention_outputs()["out"]},
    ),
}
SELECT = ("k", "out", "known", "in_out", "in_out_w", "workspace_size")
WITH_OUT = ("out", "known", "in_out", "in_out_w", "workspace_size")
# Those that look at lengths and tables.
RUNNING = ("k", "out", "known", "in_out", "in_out_w")
ATTENTION = ("attention", "attention_new", "attention_size")
# Those that make their result.
NEW = ("k", "attention_new")
# Those that only say how much they need.
SIZES = ("workspace_size", "attention_size")


def output_of(entry: str) -> str:
    """Return what an entry calls its selection."""
    return "selected_indices" if entry.startswith("in_out") else "out"


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


# What to change in the arguments of a call that is right.


def put(*at: int, value: int) -> Change:
    """Set one element."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[at] = value
        return tensor

    return change


def resized(*shape: int) -> Change:
    """Repeat or cut the tensor to another shape of the same rank."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(shape):
            at = torch.arange(size) % max(tensor.shape[dim], 1)
            tensor = tensor.index_select(dim, at)
        return tensor

    return change


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def on(*device: int) -> Change:
    """Claim that the tensor is on another device."""
    return lambda tensor: RawTensor(tensor, device)


def numpy_of(dtype: Any) -> Change:
    def change(tensor: torch.Tensor) -> np.ndarray:
        with np.errstate(over="ignore"):
            return tensor.numpy().astype(dtype)

    return change


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values two elements apart."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def reversed_last(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy()[..., ::-1])[..., ::-1]


def shifted(num_bytes: int) -> Change:
    """Return the same values at an address that is off by some bytes."""

    def change(tensor: torch.Tensor) -> np.ndarray:
        array = tensor.numpy()
        buffer = np.zeros(array.nbytes + 64, np.uint8)
        start = -buffer.ctypes.data % 16 + num_bytes
        view = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        return view

    return change


def read_only(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.numpy()
    array.flags.writeable = False
    return array


def same_in(dim: int) -> Change:
    """Let all elements of a dimension share memory."""
    return lambda tensor: tensor.narrow(dim, 0, 1).expand(tensor.shape)


def strided(*strides: int) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        flat = torch.full((2 * tensor.numel(),), POISON, dtype=tensor.dtype)
        return flat.as_strided(tensor.shape, strides)

    return change


def value(new: Any) -> Change:
    return lambda _old: new


Line = tuple[dict[str, Change], type[Exception], str]


def expect(entry: str, line: Line) -> None:
    """Check the error of a changed call, that it is documented, and that nothing is written."""
    changes, kind, message = line
    assert is_documented(message)
    arguments = ENTRIES[entry].arguments()
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name))
    arguments = {name: value for name, value in arguments.items() if value is not MISSING}
    before = snapshot(arguments)
    with pytest.raises(kind) as caught:
        ENTRIES[entry].function(**arguments)
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert snapshot(arguments) == before, "an error must leave everything as it was"


MISSING = object()


@pytest.mark.parametrize("entry", ENTRIES)
def test_unchanged_call_is_right(entry: str) -> None:
    """What the other tests change is a call without errors."""
    arguments = ENTRIES[entry].arguments()
    ENTRIES[entry].function(**arguments)
    if entry not in (*NEW, *SIZES):
        output = "maxblocks" if entry == "prefill" else output_of(entry)
        assert (arguments[output] != POISON).any()


# The same mistakes in every tensor argument of every function.

DIMS = {
    "prefill": {
        "k_cache": "[num_kv_blocks, block_size, N, D]",
        "block_tables": "[B, MKBPR]",
        "seq_lens": "[B]",
        "metadata_block_tables": "[B, MMBPR]",
        "maxblocks": "[num_meta_blocks, R, N, D]",
        "minblocks": "[num_meta_blocks, R, N, D]",
        "metadata_seq_lens": "[B]",
    },
    "select": {
        "query": "[B, H, D]",
        "maxblocks": "[num_meta_blocks, R, N, D]",
        "minblocks": "[num_meta_blocks, R, N, D]",
        "metadata_block_tables": "[B, MMBPR]",
        "seq_lens": "[B]",
        "out": "[B, N, k]",
        "selected_indices": "[B, N, k]",
        "metadata_seq_lens": "[B]",
        "workspace": "[bytes]",
    },
    "tables": {
        "selected_indices": "[B, N, k]",
        "block_tables": "[B, MKBPR]",
        "seq_lens": "[B]",
        "out": "[B, N, k]",
        "lens_out": "[B, N]",
    },
    "attention": {
        "query": "[B, H, D]",
        "k_cache": "[num_kv_blocks, block_size, N, D]",
        "v_cache": "[num_kv_blocks, block_size, N, D]",
        "block_tables": "[B, MKBPR]",
        "seq_lens": "[B]",
        "selected_indices": "[B, N, k]",
        "out": "[B, H, D]",
        "lse": "[B, H]",
        "workspace": "[bytes]",
    },
}
FIRST = {
    "prefill": "k_cache",
    "select": "query",
    "tables": "selected_indices",
    "attention": "query",
}
WRITTEN = {
    "prefill": ("maxblocks", "minblocks"),
    "select": ("out", "selected_indices", "workspace"),
    "tables": ("out", "lens_out"),
    "attention": ("out", "lse", "workspace"),
}
# Of the type of the first argument.
LIKE_FIRST = {
    "prefill": ("k_cache", "maxblocks", "minblocks"),
    "select": ("query", "maxblocks", "minblocks"),
    "tables": (),
    "attention": ("query", "k_cache", "v_cache", "out"),
}


def operator_of(entry: str) -> str:
    if entry in ATTENTION:
        return "attention"
    return "select" if entry in SELECT else entry


def named(entry: str, argument: str) -> str:
    """Return what the library calls an argument of `quest_block_select_paged` and its like."""
    if entry in SELECT and argument == output_of(entry):
        return "selected_indices (out)"
    return argument


def tensors() -> Iterator[tuple[str, str]]:
    """Yield every tensor argument of every entry."""
    for entry, made in ENTRIES.items():
        for name, held in made.arguments().items():
            if is_tensor(held):
                yield entry, name


def everywhere(function: Callable[..., None]) -> Any:
    return pytest.mark.parametrize(("entry", "argument"), list(tensors()))(function)


@everywhere
@pytest.mark.parametrize("wrong", [[1], (1,), 7, 1.5, "text", np.float16(1)], ids=repr)
def test_not_a_tensor(entry: str, argument: str, wrong: Any) -> None:
    message = f"{argument} must be a tensor, got {type(wrong).__name__}"
    expect(entry, ({argument: value(wrong)}, TypeError, message))


@everywhere
def test_none(entry: str, argument: str) -> None:
    if argument in ("metadata_seq_lens", "workspace", "lens_out", "lse"):
        pytest.skip("None leaves it out")
    if argument == "out" and entry in ("tables", "attention"):
        pytest.skip("None leaves it out")
    line = ({argument: value(None)}, TypeError, f"{argument} must be a tensor, got NoneType")
    if argument == "out" and entry in ("out", "known"):
        line = (line[0], ValueError, "expected either k or out, got neither")
    expect(entry, line)


@everywhere
@pytest.mark.parametrize("by", [-1, 1])
def test_rank(entry: str, argument: str, by: int) -> None:
    dims = DIMS[operator_of(entry)][argument]

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0] if by == -1 else tensor[None]

    got = list(change(ENTRIES[entry].arguments()[argument]).shape)
    message = f"{named(entry, argument)} must be {dims}, got {got}"
    expect(entry, ({argument: change}, ValueError, message))


DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.complex64: "complex64",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint32: "uint32",
    torch.bool: "bool",
}


def expected_dtype(entry: str, argument: str) -> str:
    operator = operator_of(entry)
    if argument == "workspace":
        return "uint8"
    if argument == "lse":
        return "float32"
    if argument in LIKE_FIRST[operator]:
        first = argument == FIRST[operator]
        return "float16, bfloat16 or float32" if first else f"float16 like {FIRST[operator]}"
    return "int32"


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(entry: str, argument: str, dtype: torch.dtype) -> None:
    expected, got = expected_dtype(entry, argument), DTYPES[dtype]
    if got in expected and "like" not in expected and expected != "int32":
        # Right for this argument, so that those that must be like it are wrong.
        if argument != FIRST[operator_of(entry)] or dtype == torch.float16:
            pytest.skip("the right type")
        second = LIKE_FIRST[operator_of(entry)][1]
        message = f"{second} must be {got} like {argument}, got float16"
    elif got == expected.split()[0]:
        pytest.skip("the right type")
    else:
        message = f"{named(entry, argument)} must be {expected}, got {got}"
    expect(entry, ({argument: to(dtype)}, TypeError, message))


@everywhere
@pytest.mark.parametrize("dtype", [object, np.complex64, np.complex128, bool, ">f2", ">i4", "U3"])
def test_numpy_dtype(entry: str, argument: str, dtype: Any) -> None:
    got = np.dtype(dtype)
    if got.kind == "U":
        got = np.dtype("U3")
    message = f"{argument} must be of a native integer or float type, got {got}"
    expect(entry, ({argument: numpy_of(dtype)}, TypeError, message))


@everywhere
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse(entry: str, argument: str, layout: str) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        if layout == "coo":
            return tensor.float().to_sparse()
        return tensor.float().reshape(-1, tensor.shape[-1]).to_sparse_csr()

    message = f"{argument} must be a dense tensor, got layout torch.sparse_{layout}"
    expect(entry, ({argument: change}, TypeError, message))


@pytest.mark.parametrize(
    ("entry", "argument"),
    [("prefill", "k_cache"), ("out", "query"), ("tables", "seq_lens"), ("attention", "v_cache")],
)
def test_quantized(entry: str, argument: str) -> None:
    arguments = ENTRIES[entry].arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments[argument] = torch.quantize_per_tensor(
            arguments[argument].float(), 0.5, 0, torch.qint8
        )
    message = f"{argument} must be of an unquantized type, got torch.qint8"
    with pytest.raises(TypeError, match=f"^{message}$"):
        ENTRIES[entry].function(**arguments)


@everywhere
@pytest.mark.parametrize("device", ["cuda:0", "npu:1", "DLPack device type 8:0"])
def test_device_mix(entry: str, argument: str, device: str) -> None:
    number = {"cuda:0": (CUDA, 0), "npu:1": (EXT_DEV, 1)}.get(device, (METAL, 0))
    first, *others = DIMS[operator_of(entry)]
    if argument == first:
        if entry in NEW:
            pytest.skip("no result like a tensor of no framework can be made")
        message = f"{others[0]} must be on {device} like {first}, got cpu"
    else:
        message = f"{named(entry, argument)} must be on cpu like {first}, got {device}"
    expect(entry, ({argument: on(*number)}, ValueError, message))


def test_device_number_mix() -> None:
    everything = {name: on(CUDA, 0) for name in DIMS["select"] if name in select_arguments()}
    changes = {**everything, "out": on(CUDA, 1)}
    message = "selected_indices (out) must be on cuda:0 like query, got cuda:1"
    expect("out", (changes, ValueError, message))


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        ("prefill", "k_cache"),
        ("prefill", "maxblocks"),
        ("k", "query"),
        ("out", "query"),
        ("out", "maxblocks"),
        ("out", "out"),
        ("tables", "selected_indices"),
        ("tables", "out"),
        ("attention", "query"),
        ("attention", "v_cache"),
        ("attention", "lse"),
        ("attention_new", "k_cache"),
    ],
)
def test_device_mix_with_meta(entry: str, argument: str) -> None:
    """A tensor without memory among others is on another device."""
    arguments = ENTRIES[entry].arguments()
    arguments[argument] = arguments[argument].to("meta")
    before = snapshot(arguments)
    first, second = list(DIMS[operator_of(entry)])[:2]
    message = f"{argument} must be on cpu like {first}, got meta"
    if argument == first:
        message = f"{second} must be on meta like {first}, got cpu"
    with pytest.raises(ValueError, match=f"^{message}$"):
        ENTRIES[entry].function(**arguments)
    assert snapshot(arguments) == before


@everywhere
@pytest.mark.parametrize("step", [2, -1])
def test_last_dimension_is_contiguous(entry: str, argument: str, step: int) -> None:
    change = every_second if step == 2 else reversed_last
    changed = change(ENTRIES[entry].arguments()[argument])
    strides = (
        list(changed.stride()) if step == 2 else [s // changed.itemsize for s in changed.strides]
    )
    message = (
        f"{named(entry, argument)} must be contiguous in its last dimension, got strides {strides}"
    )
    expect(entry, ({argument: change}, ValueError, message))


@everywhere
def test_last_dimension_is_not_broadcast(entry: str, argument: str) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[..., :1].expand(tensor.shape)

    strides = list(change(ENTRIES[entry].arguments()[argument]).stride())
    message = (
        f"{named(entry, argument)} must be contiguous in its last dimension, got strides {strides}"
    )
    expect(entry, ({argument: change}, ValueError, message))


@everywhere
@pytest.mark.parametrize("off", [1, 2, 3])
def test_alignment(entry: str, argument: str, off: int) -> None:
    size = ENTRIES[entry].arguments()[argument].element_size()
    if off % size == 0:
        pytest.skip("aligned to its elements, which is all that is asked for")
    message = (
        f"{named(entry, argument)} must be aligned to its elements of {size} bytes, got an address "
        f"that is {off % size} beyond"
    )
    expect(entry, ({argument: shifted(off)}, ValueError, message))


@everywhere
def test_output_overlaps_itself(entry: str, argument: str) -> None:
    if argument not in WRITTEN[operator_of(entry)] or argument == "workspace":
        pytest.skip("not written, or of one dimension")
    if operator_of(entry) == "select" and argument != output_of(entry):
        pytest.skip("not written")
    tensor = ENTRIES[entry].arguments()[argument]
    for dim in range(tensor.dim() - 1):
        overlapping = same_in(dim)
        message = (
            f"{named(entry, argument)} is written and must not overlap itself, got shape "
            f"{list(tensor.shape)} with strides {list(overlapping(tensor).stride())}"
        )
        expect(entry, ({argument: overlapping}, ValueError, message))


@everywhere
def test_output_is_read_only(entry: str, argument: str) -> None:
    if argument not in WRITTEN[operator_of(entry)] or entry in SIZES:
        pytest.skip("not written")
    message = f"{argument} is written and must not be read-only"
    expect(entry, ({argument: read_only}, ValueError, message))


@pytest.mark.parametrize("entry", ENTRIES)
def test_input_is_read_only(entry: str) -> None:
    """What is only read may be read-only."""
    arguments = ENTRIES[entry].arguments()
    for name, held in arguments.items():
        if is_tensor(held) and name not in (*WRITTEN[operator_of(entry)], output_of(entry)):
            written = entry == "prefill" and name in WRITTEN[entry]
            arguments[name] = held if written else read_only(held)
    ENTRIES[entry].function(**arguments)


# Mistakes of one argument of one function.

PREFILL: dict[str, Line] = {
    "heads_of_maxblocks": (
        {"maxblocks": resized(4, 2, 3, 8)},
        ValueError,
        "maxblocks must be [*, *, 2, 8], got [4, 2, 3, 8]",
    ),
    "head_dim_of_maxblocks": (
        {"maxblocks": resized(4, 2, 2, 7)},
        ValueError,
        "maxblocks must be [*, *, 2, 8], got [4, 2, 2, 7]",
    ),
    "blocks_of_minblocks": (
        {"minblocks": resized(5, 2, 2, 8)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [5, 2, 2, 8]",
    ),
    "rows_of_minblocks": (
        {"minblocks": resized(4, 3, 2, 8)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [4, 3, 2, 8]",
    ),
    "heads_of_minblocks": (
        {"minblocks": resized(4, 2, 1, 8)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [4, 2, 1, 8]",
    ),
    "head_dim_of_minblocks": (
        {"minblocks": resized(4, 2, 2, 9)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [4, 2, 2, 9]",
    ),
    "heads_of_k_cache": (
        {"k_cache": resized(6, 4, 4, 8)},
        ValueError,
        "maxblocks must be [*, *, 4, 8], got [4, 2, 2, 8]",
    ),
    "head_dim_of_k_cache": (
        {"k_cache": resized(6, 4, 2, 16)},
        ValueError,
        "maxblocks must be [*, *, 2, 16], got [4, 2, 2, 8]",
    ),
    "batch_of_block_tables": (
        {"block_tables": resized(3, 3)},
        ValueError,
        "seq_lens must be [3], got [2]",
    ),
    "batch_of_seq_lens": (
        {"seq_lens": resized(1)},
        ValueError,
        "seq_lens must be [2], got [1]",
    ),
    "batch_of_metadata_block_tables": (
        {"metadata_block_tables": resized(3, 2)},
        ValueError,
        "metadata_block_tables must be [2, *], got [3, 2]",
    ),
    "batch_of_metadata_seq_lens": (
        {"metadata_seq_lens": resized(4)},
        ValueError,
        "metadata_seq_lens must be [2], got [4]",
    ),
    "no_token_per_block": (
        {"k_cache": resized(6, 0, 2, 8)},
        ValueError,
        "k_cache must have block_size >= 1, got [6, 0, 2, 8]",
    ),
    "no_head": (
        {"k_cache": resized(6, 4, 0, 8)},
        ValueError,
        "k_cache must have N >= 1, got [6, 4, 0, 8]",
    ),
    "no_channel": (
        {"k_cache": resized(6, 4, 2, 0)},
        ValueError,
        "k_cache must have D >= 1, got [6, 4, 2, 0]",
    ),
    "no_row": (
        {"maxblocks": resized(4, 0, 2, 8), "minblocks": resized(4, 0, 2, 8)},
        ValueError,
        "maxblocks must have R >= 1, got [4, 0, 2, 8]",
    ),
    "overlap_in_part": (
        {"minblocks": strided(32, 8, 8, 1)},
        ValueError,
        "minblocks is written and must not overlap itself, got shape [4, 2, 2, 8] with strides "
        "[32, 8, 8, 1]",
    ),
    "rows_that_overlap_by_one": (
        {"maxblocks": strided(28, 14, 7, 1)},
        ValueError,
        "maxblocks is written and must not overlap itself, got shape [4, 2, 2, 8] with strides "
        "[28, 14, 7, 1]",
    ),
    "negative_length": (
        {"seq_lens": put(1, value=-1)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got -1",
    ),
    "least_length": (
        {"seq_lens": put(1, value=-(2**31))},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got -2147483648",
    ),
    "length_beyond_block_tables": (
        {"seq_lens": put(1, value=13)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got 13",
    ),
    "greatest_length": (
        {"seq_lens": put(1, value=2**31 - 1)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got 2147483647",
    ),
    "length_beyond_metadata_block_tables": (
        {"metadata_block_tables": resized(2, 1), "seq_lens": put(0, value=9)},
        ValueError,
        "seq_lens[0] must be in [0, 8], what metadata_block_tables holds, got 9",
    ),
    "length_without_tables": (
        {"block_tables": resized(2, 0)},
        ValueError,
        "seq_lens[0] must be in [0, 0], what block_tables holds, got 9",
    ),
    "negative_metadata_length": (
        {"metadata_seq_lens": put(1, value=-1)},
        ValueError,
        "metadata_seq_lens[1] must be in [0, 8], the request's length, got -1",
    ),
    "metadata_length_beyond_the_request": (
        {"metadata_seq_lens": put(1, value=9)},
        ValueError,
        "metadata_seq_lens[1] must be in [0, 8], the request's length, got 9",
    ),
    "negative_block": (
        {"block_tables": put(1, 1, value=-1)},
        ValueError,
        "block_tables[1, 1] must be in [0, 6), got -1",
    ),
    "block_beyond_the_pool": (
        {"block_tables": put(1, 1, value=6)},
        ValueError,
        "block_tables[1, 1] must be in [0, 6), got 6",
    ),
    "block_far_beyond_the_pool": (
        {"block_tables": put(1, 0, value=2**31 - 1)},
        ValueError,
        "block_tables[1, 0] must be in [0, 6), got 2147483647",
    ),
    "block_of_a_partial_block": (
        {"block_tables": put(0, 2, value=-(2**31))},
        ValueError,
        "block_tables[0, 2] must be in [0, 6), got -2147483648",
    ),
    "block_of_an_empty_pool": (
        {"k_cache": resized(0, 4, 2, 8)},
        ValueError,
        "block_tables[0, 0] must be in [0, 0), got 2",
    ),
    "negative_metadata_block": (
        {"metadata_block_tables": put(1, 0, value=-1)},
        ValueError,
        "metadata_block_tables[1, 0] must be in [0, 4), got -1",
    ),
    "metadata_block_beyond_the_pool": (
        {"metadata_block_tables": put(1, 0, value=4)},
        ValueError,
        "metadata_block_tables[1, 0] must be in [0, 4), got 4",
    ),
    "second_metadata_block_beyond_the_pool": (
        {"metadata_block_tables": put(0, 1, value=2**31 - 1)},
        ValueError,
        "metadata_block_tables[0, 1] must be in [0, 4), got 2147483647",
    ),
    "block_at_the_start_of_an_update": (
        {"metadata_seq_lens": put(1, value=7), "block_tables": put(1, 1, value=-5)},
        ValueError,
        "block_tables[1, 1] must be in [0, 6), got -5",
    ),
    "metadata_block_that_an_update_shares": (
        {"metadata_seq_lens": put(1, value=7), "metadata_block_tables": put(1, 0, value=-5)},
        ValueError,
        "metadata_block_tables[1, 0] must be in [0, 4), got -5",
    ),
    "stream": (
        {"stream": value("fast")},
        TypeError,
        "stream must be an integer, got str",
    ),
}

SELECT_SHAPES: dict[str, Line] = {
    "heads_not_a_multiple": (
        {"query": resized(2, 5, 8)},
        ValueError,
        "query must have a multiple of the 2 KV heads of maxblocks, got 5 heads",
    ),
    "fewer_heads_than_kv_heads": (
        {"query": resized(2, 1, 8)},
        ValueError,
        "query must have a multiple of the 2 KV heads of maxblocks, got 1 heads",
    ),
    "head_dim_of_query": (
        {"query": resized(2, 6, 7)},
        ValueError,
        "maxblocks must be [*, *, *, 7], got [4, 2, 2, 8]",
    ),
    "head_dim_of_maxblocks": (
        {"maxblocks": resized(4, 2, 2, 9)},
        ValueError,
        "maxblocks must be [*, *, *, 8], got [4, 2, 2, 9]",
    ),
    "blocks_of_minblocks": (
        {"minblocks": resized(3, 2, 2, 8)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [3, 2, 2, 8]",
    ),
    "rows_of_minblocks": (
        {"minblocks": resized(4, 1, 2, 8)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [4, 1, 2, 8]",
    ),
    "heads_of_minblocks": (
        {"minblocks": resized(4, 2, 1, 8)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [4, 2, 1, 8]",
    ),
    "head_dim_of_minblocks": (
        {"minblocks": resized(4, 2, 2, 7)},
        ValueError,
        "minblocks must be [4, 2, 2, 8], got [4, 2, 2, 7]",
    ),
    "batch_of_tables": (
        {"metadata_block_tables": resized(3, 2)},
        ValueError,
        "metadata_block_tables must be [2, *], got [3, 2]",
    ),
    "batch_of_seq_lens": (
        {"seq_lens": resized(3)},
        ValueError,
        "seq_lens must be [2], got [3]",
    ),
    "elements_beyond_64_bits_of_bytes": (
        {"query": lambda tensor: tensor[:, :1].expand(2, 2**56, 8)},
        ValueError,
        "query must have at most 2^56 elements, got [2, 72057594037927936, 8]",
    ),
    "no_query_head": (
        {"query": resized(2, 0, 8)},
        ValueError,
        "query must have H >= 1, got [2, 0, 8]",
    ),
    "no_channel": (
        {"query": resized(2, 6, 0)},
        ValueError,
        "query must have D >= 1, got [2, 6, 0]",
    ),
    "no_row": (
        {"maxblocks": resized(4, 0, 2, 8)},
        ValueError,
        "maxblocks must have R >= 1, got [4, 0, 2, 8]",
    ),
    "no_kv_head": (
        {"maxblocks": resized(4, 2, 0, 8)},
        ValueError,
        "maxblocks must have N >= 1, got [4, 2, 0, 8]",
    ),
    "one_row_and_no_block_size": (
        {"maxblocks": resized(4, 1, 2, 8), "minblocks": resized(4, 1, 2, 8)},
        ValueError,
        "block_size must be given where metadata blocks have one row, got none for maxblocks of "
        "R == 1 (quest_block_select_paged takes one)",
    ),
}
SELECT_BATCH: dict[str, Line] = {
    "batch_of_query": (
        {"query": resized(3, 6, 8)},
        ValueError,
        "metadata_block_tables must be [3, *], got [2, 2]",
    ),
}
SELECT_OUT: dict[str, Line] = {
    "batch": (
        {"selected_indices": resized(1, 2, 3)},
        ValueError,
        "selected_indices (out) must be [2, 2, *], got [1, 2, 3]",
    ),
    "kv_heads": (
        {"selected_indices": resized(2, 3, 3)},
        ValueError,
        "selected_indices (out) must be [2, 2, *], got [2, 3, 3]",
    ),
    "kv_heads_of_the_pools": (
        {"maxblocks": resized(4, 2, 3, 8), "minblocks": resized(4, 2, 3, 8)},
        ValueError,
        "selected_indices (out) must be [2, 3, *], got [2, 2, 3]",
    ),
    "no_slot": (
        {"selected_indices": resized(2, 2, 0)},
        ValueError,
        "selected_indices (out) must have k >= 1, got [2, 2, 0]",
    ),
    "overlap_in_part": (
        {"selected_indices": strided(3, 2, 1)},
        ValueError,
        "selected_indices (out) is written and must not overlap itself, got shape [2, 2, 3] with "
        "strides [3, 2, 1]",
    ),
}
SELECT_VALUES: dict[str, Line] = {
    "negative_length": (
        {"seq_lens": put(1, value=-1)},
        ValueError,
        "seq_lens[1] must be at least 0, got -1",
    ),
    "least_length": (
        {"seq_lens": put(1, value=-(2**31))},
        ValueError,
        "seq_lens[1] must be at least 0, got -2147483648",
    ),
    "negative_block": (
        {"metadata_block_tables": put(1, 1, value=-1)},
        ValueError,
        "metadata_block_tables[1, 1] must be in [0, 4), got -1",
    ),
    "block_beyond_the_pool": (
        {"metadata_block_tables": put(1, 1, value=4)},
        ValueError,
        "metadata_block_tables[1, 1] must be in [0, 4), got 4",
    ),
    "first_block_far_beyond_the_pool": (
        {"metadata_block_tables": put(1, 0, value=2**31 - 1)},
        ValueError,
        "metadata_block_tables[1, 0] must be in [0, 4), got 2147483647",
    ),
    "first_block_far_before_the_pool": (
        {"metadata_block_tables": put(1, 0, value=-(2**31))},
        ValueError,
        "metadata_block_tables[1, 0] must be in [0, 4), got -2147483648",
    ),
}
# Without a window, the greatest length that the table holds is 8.
SELECT_LENGTHS: dict[str, Line] = {
    "block_of_an_empty_pool": (
        {"maxblocks": resized(0, 2, 2, 8), "minblocks": resized(0, 2, 2, 8)},
        ValueError,
        "metadata_block_tables[0, 0] must be in [0, 0), got 2",
    ),
    "length_beyond_the_table": (
        {"seq_lens": put(1, value=9)},
        ValueError,
        "seq_lens[1] must be at most 8 outside the window, what metadata_block_tables holds, got 9",
    ),
    "greatest_length": (
        {"seq_lens": put(1, value=2**31 - 1)},
        ValueError,
        "seq_lens[1] must be at most 8 outside the window, what metadata_block_tables holds, got "
        "2147483647",
    ),
    "length_without_a_table": (
        {"metadata_block_tables": resized(2, 0)},
        ValueError,
        "seq_lens[0] must be at most 0 outside the window, what metadata_block_tables holds, got 3",
    ),
}
SELECT_K: dict[str, Line] = {
    "no_k": ({"k": value(0)}, ValueError, "k must be at least 1, got 0"),
    "negative_k": ({"k": value(-3)}, ValueError, "k must be at least 1, got -3"),
    "float_k": ({"k": value(3.0)}, TypeError, "k must be an integer, got float"),
    "text_k": ({"k": value("3")}, TypeError, "k must be an integer, got str"),
    "tuple_k": ({"k": value((3,))}, TypeError, "k must be an integer, got tuple"),
    "neither": ({"k": value(None)}, ValueError, "expected either k or out, got neither"),
    "both": (
        {"out": value(poison(2, 2, 3))},
        ValueError,
        "expected either k or out, got both",
    ),
    "tensor_that_none_can_be_made_like": (
        {"query": ForeignTensor},
        TypeError,
        "no tensor like a ForeignTensor can be made (it has no array namespace): pass the output",
    ),
}
SELECT_OPTIONS: dict[str, Line] = {
    "block_size_0": (
        {"block_size": value(0)},
        ValueError,
        "block_size must be at least 1, got 0",
    ),
    "block_size_negative": (
        {"block_size": value(-(2**63))},
        ValueError,
        "block_size must be at least 1, got -9223372036854775808",
    ),
    "block_size_float": (
        {"block_size": value(2.0)},
        TypeError,
        "block_size must be an integer, got float",
    ),
    "block_size_text": (
        {"block_size": value("2")},
        TypeError,
        "block_size must be an integer, got str",
    ),
    "t_below_minus_1": (
        {"tokens_since_metadata_update": value(-2)},
        ValueError,
        "tokens_since_metadata_update must be at least -1, got -2",
    ),
    "t_far_below_minus_1": (
        {"tokens_since_metadata_update": value(-(2**63))},
        ValueError,
        "tokens_since_metadata_update must be at least -1, got -9223372036854775808",
    ),
    "t_none": (
        {"tokens_since_metadata_update": value(None)},
        TypeError,
        "tokens_since_metadata_update must be an integer, got NoneType",
    ),
    "t_float": (
        {"tokens_since_metadata_update": value(1.5)},
        TypeError,
        "tokens_since_metadata_update must be an integer, got float",
    ),
    "stream": ({"stream": value("fast")}, TypeError, "stream must be an integer, got str"),
    "stream_float": ({"stream": value(1.0)}, TypeError, "stream must be an integer, got float"),
}
SELECT_KNOWN: dict[str, Line] = {
    "both_windows": (
        {"tokens_since_metadata_update": value(0)},
        ValueError,
        "expected tokens_since_metadata_update or metadata_seq_lens, got both",
    ),
    "negative": (
        {"metadata_seq_lens": put(1, value=-1)},
        ValueError,
        "metadata_seq_lens[1] must be in [0, 6], the request's length, got -1",
    ),
    "beyond_the_request": (
        {"metadata_seq_lens": put(1, value=7)},
        ValueError,
        "metadata_seq_lens[1] must be in [0, 6], the request's length, got 7",
    ),
    "of_an_empty_request": (
        {"seq_lens": put(1, value=0), "metadata_seq_lens": put(1, value=1)},
        ValueError,
        "metadata_seq_lens[1] must be in [0, 0], the request's length, got 1",
    ),
    "batch": (
        {"metadata_seq_lens": resized(3)},
        ValueError,
        "metadata_seq_lens must be [2], got [3]",
    ),
    "scored_blocks_beyond_the_table": (
        {"seq_lens": put(1, value=11), "metadata_seq_lens": put(1, value=10)},
        ValueError,
        "seq_lens[1] must be at most 8 outside the window, what metadata_block_tables holds, "
        "got 11",
    ),
    "scored_entry_outside_the_pool": (
        {"metadata_block_tables": put(1, 0, value=-1)},
        ValueError,
        "metadata_block_tables[1, 0] must be in [0, 4), got -1",
    ),
}
SELECT_T: dict[str, Line] = {
    "scored_blocks_beyond_the_table": (
        {"seq_lens": put(1, value=11), "tokens_since_metadata_update": value(1)},
        ValueError,
        "seq_lens[1] must be at most 8 outside the window, what metadata_block_tables holds, "
        "got 11",
    ),
    "scored_entry_outside_the_pool": (
        {
            "metadata_block_tables": put(1, 1, value=-1),
            "tokens_since_metadata_update": value(0),
        },
        ValueError,
        "metadata_block_tables[1, 1] must be in [0, 4), got -1",
    ),
}
TABLES: dict[str, Line] = {
    "batch_of_block_tables": (
        {"block_tables": resized(3, 3)},
        ValueError,
        "block_tables must be [2, *], got [3, 3]",
    ),
    "batch_of_seq_lens": (
        {"seq_lens": resized(3)},
        ValueError,
        "seq_lens must be [2], got [3]",
    ),
    "batch_of_selection": (
        {"selected_indices": resized(3, 2, 3)},
        ValueError,
        "block_tables must be [3, *], got [2, 3]",
    ),
    "batch_of_out": (
        {"out": resized(3, 2, 3)},
        ValueError,
        "out must be [2, 2, 3], got [3, 2, 3]",
    ),
    "heads_of_out": (
        {"out": resized(2, 1, 3)},
        ValueError,
        "out must be [2, 2, 3], got [2, 1, 3]",
    ),
    "slots_of_out": (
        {"out": resized(2, 2, 4)},
        ValueError,
        "out must be [2, 2, 3], got [2, 2, 4]",
    ),
    "batch_of_lens": (
        {"lens_out": resized(1, 2)},
        ValueError,
        "lens_out must be [2, 2], got [1, 2]",
    ),
    "heads_of_lens": (
        {"lens_out": resized(2, 3)},
        ValueError,
        "lens_out must be [2, 2], got [2, 3]",
    ),
    "no_slot": (
        {"selected_indices": resized(2, 2, 0)},
        ValueError,
        "selected_indices must have k >= 1, got [2, 2, 0]",
    ),
    "no_head": (
        {"selected_indices": resized(2, 0, 3)},
        ValueError,
        "selected_indices must have N >= 1, got [2, 0, 3]",
    ),
    "block_size_0": (
        {"block_size": value(0)},
        ValueError,
        "block_size must be at least 1, got 0",
    ),
    "block_size_negative": (
        {"block_size": value(-4)},
        ValueError,
        "block_size must be at least 1, got -4",
    ),
    "block_size_float": (
        {"block_size": value(4.0)},
        TypeError,
        "block_size must be an integer, got float",
    ),
    "block_size_none": (
        {"block_size": value(None)},
        TypeError,
        "block_size must be an integer, got NoneType",
    ),
    "negative_length": (
        {"seq_lens": put(1, value=-1)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got -1",
    ),
    "length_beyond_the_table": (
        {"seq_lens": put(1, value=13)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got 13",
    ),
    "greatest_length": (
        {"seq_lens": put(1, value=2**31 - 1)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got 2147483647",
    ),
    "block_below_minus_1": (
        {"selected_indices": put(1, 1, 2, value=-2)},
        ValueError,
        "selected_indices[1, 1, 2] must be -1 or in [0, 2), the request's blocks, got -2",
    ),
    "block_beyond_the_request": (
        {"selected_indices": put(1, 1, 2, value=2)},
        ValueError,
        "selected_indices[1, 1, 2] must be -1 or in [0, 2), the request's blocks, got 2",
    ),
    "greatest_block": (
        {"selected_indices": put(1, 1, 2, value=2**31 - 1)},
        ValueError,
        "selected_indices[1, 1, 2] must be -1 or in [0, 2), the request's blocks, got 2147483647",
    ),
    "block_of_an_empty_request": (
        {"seq_lens": put(1, value=0)},
        ValueError,
        "selected_indices[1, 0, 0] must be -1 or in [0, 0), the request's blocks, got 1",
    ),
    "negative_table_entry": (
        {"block_tables": put(1, 0, value=-1)},
        ValueError,
        "block_tables[1, 0] must be at least 0, got -1",
    ),
    "least_table_entry": (
        {"block_tables": put(1, 1, value=-(2**31))},
        ValueError,
        "block_tables[1, 1] must be at least 0, got -2147483648",
    ),
    "more_tokens_than_an_int32": (
        {
            "selected_indices": value(int32([[[0, -1, -1], [0, -1, -1]], [[-1] * 3, [0, -1, 0]]])),
            "block_size": value(2**30),
            "seq_lens": value(int32([2**30, 2**30])),
        },
        ValueError,
        "selected_indices[1, 1] must hold fewer than 2^31 tokens, got 2147483648",
    ),
    "stream": ({"stream": value("fast")}, TypeError, "stream must be an integer, got str"),
}


ATTENTION_SHAPES: dict[str, Line] = {
    "channels_of_k_cache": (
        {"k_cache": resized(6, 4, 2, 9)},
        ValueError,
        "k_cache must be [*, *, *, 8], got [6, 4, 2, 9]",
    ),
    "blocks_of_v_cache": (
        {"v_cache": resized(5, 4, 2, 8)},
        ValueError,
        "v_cache must be [6, 4, 2, 8], got [5, 4, 2, 8]",
    ),
    "tokens_of_v_cache": (
        {"v_cache": resized(6, 3, 2, 8)},
        ValueError,
        "v_cache must be [6, 4, 2, 8], got [6, 3, 2, 8]",
    ),
    "heads_of_v_cache": (
        {"v_cache": resized(6, 4, 1, 8)},
        ValueError,
        "v_cache must be [6, 4, 2, 8], got [6, 4, 1, 8]",
    ),
    "channels_of_v_cache": (
        {"v_cache": resized(6, 4, 2, 7)},
        ValueError,
        "v_cache must be [6, 4, 2, 8], got [6, 4, 2, 7]",
    ),
    "batch_of_block_tables": (
        {"block_tables": resized(3, 3)},
        ValueError,
        "block_tables must be [2, *], got [3, 3]",
    ),
    "batch_of_seq_lens": (
        {"seq_lens": resized(3)},
        ValueError,
        "seq_lens must be [2], got [3]",
    ),
    "batch_of_selection": (
        {"selected_indices": resized(1, 2, 3)},
        ValueError,
        "selected_indices must be [2, 2, *], got [1, 2, 3]",
    ),
    "heads_of_selection": (
        {"selected_indices": resized(2, 6, 3)},
        ValueError,
        "selected_indices must be [2, 2, *], got [2, 6, 3]",
    ),
    "no_token_per_block": (
        {"k_cache": resized(6, 0, 2, 8)},
        ValueError,
        "k_cache must have block_size >= 1, got [6, 0, 2, 8]",
    ),
    "no_kv_head": (
        {"k_cache": resized(6, 4, 0, 8)},
        ValueError,
        "k_cache must have N >= 1, got [6, 4, 0, 8]",
    ),
    "no_slot": (
        {"selected_indices": resized(2, 2, 0)},
        ValueError,
        "selected_indices must have k >= 1, got [2, 2, 0]",
    ),
    "heads_that_do_not_divide": (
        {
            "k_cache": resized(6, 4, 4, 8),
            "v_cache": resized(6, 4, 4, 8),
            "selected_indices": resized(2, 4, 3),
        },
        ValueError,
        "query must have a multiple of the 4 KV heads of k_cache, got 6 heads",
    ),
}
ATTENTION_OUT: dict[str, Line] = {
    "batch_of_out": (
        {"out": resized(3, 6, 8)},
        ValueError,
        "out must be [2, 6, 8], got [3, 6, 8]",
    ),
    "heads_of_out": (
        {"out": resized(2, 2, 8)},
        ValueError,
        "out must be [2, 6, 8], got [2, 2, 8]",
    ),
    "channels_of_out": (
        {"out": resized(2, 6, 7)},
        ValueError,
        "out must be [2, 6, 8], got [2, 6, 7]",
    ),
}
ATTENTION_VALUES: dict[str, Line] = {
    "negative_length": (
        {"seq_lens": put(1, value=-1)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got -1",
    ),
    "length_beyond_the_table": (
        {"seq_lens": put(1, value=13)},
        ValueError,
        "seq_lens[1] must be in [0, 12], what block_tables holds, got 13",
    ),
    "block_below_minus_1": (
        {"selected_indices": put(1, 1, 2, value=-2)},
        ValueError,
        "selected_indices[1, 1, 2] must be -1 or in [0, 2), the request's blocks, got -2",
    ),
    "block_beyond_the_request": (
        {"selected_indices": put(1, 1, 2, value=2)},
        ValueError,
        "selected_indices[1, 1, 2] must be -1 or in [0, 2), the request's blocks, got 2",
    ),
    "block_of_an_empty_request": (
        {"seq_lens": put(1, value=0)},
        ValueError,
        "selected_indices[1, 0, 0] must be -1 or in [0, 0), the request's blocks, got 1",
    ),
    "negative_table_entry": (
        {"block_tables": put(1, 0, value=-1)},
        ValueError,
        "block_tables[1, 0] must be in [0, 6), got -1",
    ),
    "table_entry_beyond_the_pool": (
        {"block_tables": put(0, 2, value=6)},
        ValueError,
        "block_tables[0, 2] must be in [0, 6), got 6",
    ),
    "scale_nan": (
        {"scale": value(float("nan"))},
        ValueError,
        "scale must be finite in float32, got nan",
    ),
    "scale_infinite": (
        {"scale": value(-float("inf"))},
        ValueError,
        "scale must be finite in float32, got -inf",
    ),
    "scale_beyond_float32": (
        {"scale": value(-1e39)},
        ValueError,
        "scale must be finite in float32, got -1e+39",
    ),
    "scale_far_beyond_float32": (
        {"scale": value(1e300)},
        ValueError,
        "scale must be finite in float32, got 1e+300",
    ),
    "scale_times_log2_of_e_beyond_float32": (
        {"scale": value(3e38)},
        ValueError,
        "scale must be finite in float32, got 3e+38",
    ),
    "scale_text": (
        {"scale": value("1")},
        TypeError,
        "scale must be a number, got str",
    ),
    "scale_huge": (
        {"scale": value(10**400)},
        ValueError,
        f"scale must be a 64-bit float, got {10**400}",
    ),
    "stream": ({"stream": value("fast")}, TypeError, "stream must be an integer, got str"),
}
ATTENTION_OPTIONS: dict[str, Line] = {
    "batch_of_lse": (
        {"lse": resized(1, 6)},
        ValueError,
        "lse must be [2, 6], got [1, 6]",
    ),
    "heads_of_lse": (
        {"lse": resized(2, 2)},
        ValueError,
        "lse must be [2, 6], got [2, 2]",
    ),
}


def lines() -> Iterator[Any]:
    """Yield every line above for every function it belongs to."""
    groups: list[tuple[tuple[str, ...], dict[str, Line], str]] = [
        (("prefill",), PREFILL, ""),
        (SELECT, SELECT_SHAPES, "shape-"),
        (tuple(entry for entry in SELECT if entry != "k"), SELECT_BATCH, "shape-"),
        (WITH_OUT, SELECT_OUT, "out-"),
        (RUNNING, SELECT_VALUES, ""),
        (("k", "out", "in_out", "in_out_w"), SELECT_LENGTHS, ""),
        (("k",), SELECT_K, ""),
        (("k", "out"), SELECT_OPTIONS, ""),
        (("known",), SELECT_KNOWN, "known-"),
        (("k", "out", "in_out_w"), SELECT_T, "t-"),
        (("tables",), TABLES, ""),
        (ATTENTION, ATTENTION_SHAPES, "shape-"),
        (("attention", "attention_size"), ATTENTION_OUT, "out-"),
        (("attention", "attention_new"), ATTENTION_VALUES, ""),
        (("attention",), ATTENTION_OPTIONS, ""),
    ]
    for entries, group, prefix in groups:
        for entry in entries:
            for name, (changes, kind, message) in group.items():
                renamed = {
                    output_of(entry)
                    if group is SELECT_OUT and key == "selected_indices"
                    else key: c
                    for key, c in changes.items()
                }
                yield pytest.param(entry, (renamed, kind, message), id=f"{entry}-{prefix}{name}")


@pytest.mark.parametrize(("entry", "line"), list(lines()))
def test_error(entry: str, line: Line) -> None:
    expect(entry, line)


@pytest.mark.parametrize("name", ["t_below_minus_1", "t_none", "t_float"])
def test_error_of_in_out_w(name: str) -> None:
    expect("in_out_w", SELECT_OPTIONS[name])


HUGE = {
    "k": ("k", "k"),
    "block_size": ("out", "block_size"),
    "tokens_since_metadata_update": ("out", "tokens_since_metadata_update"),
    "stream": ("out", "stream"),
    "block_size of tables": ("tables", "block_size"),
    "stream of attention": ("attention", "stream"),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("number", [2**63, 2**70], ids=["2^63", "2^70"])
def test_integer_beyond_64_bits(name: str, number: int) -> None:
    """The message is in the caller's words: it names the argument, not a conversion inside."""
    entry, argument = HUGE[name]
    arguments = {**ENTRIES[entry].arguments(), argument: number}
    before = snapshot(arguments)
    with pytest.raises(ValueError, match=f"^{argument} must be a 64-bit integer, got {number}$"):
        ENTRIES[entry].function(**arguments)
    assert snapshot(arguments) == before


def test_pools_share_memory() -> None:
    arguments = prefill_arguments()
    arguments["minblocks"] = arguments["maxblocks"]
    before = snapshot(arguments)
    message = (
        "maxblocks and minblocks are written and must not share memory, got the same address for "
        "both"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quest_prefill_metadata(**arguments)
    assert snapshot(arguments) == before


# The first mistake that is reported: rank, dtype, device, shape, layout, values.
ORDER: dict[str, Line] = {
    "rank_before_dtype": (
        {"query": to(torch.float64), "seq_lens": lambda tensor: tensor[None]},
        ValueError,
        "seq_lens must be [B], got [1, 2]",
    ),
    "dtype_before_device": (
        {"query": on(CUDA, 0), "seq_lens": to(torch.int64)},
        TypeError,
        "seq_lens must be int32, got int64",
    ),
    "device_before_shape": (
        {"maxblocks": resized(4, 2, 2, 9), "seq_lens": on(CUDA, 0)},
        ValueError,
        "seq_lens must be on cpu like query, got cuda:0",
    ),
    "shape_before_layout": (
        {"query": every_second, "seq_lens": resized(3)},
        ValueError,
        "seq_lens must be [2], got [3]",
    ),
    "layout_before_values": (
        {"seq_lens": put(0, value=-1), "out": strided(3, 2, 1)},
        ValueError,
        "selected_indices (out) is written and must not overlap itself, got shape [2, 2, 3] with "
        "strides [3, 2, 1]",
    ),
}


@pytest.mark.parametrize("name", ORDER)
def test_order_of_checks(name: str) -> None:
    expect("out", ORDER[name])


# Devices that no backend serves.


def all_on(entry: str, *device: int) -> dict[str, Change]:
    return {
        name: on(*device) for name, held in ENTRIES[entry].arguments().items() if is_tensor(held)
    }


NAMES = {
    "prefill": "quest_prefill_metadata",
    "select": "quest_block_select_paged",
    "tables": "selected_block_tables",
    "attention": "paged_select_attention",
}
ON_DEVICE = [entry for entry in ENTRIES if entry not in NEW]


@pytest.mark.parametrize("entry", ON_DEVICE)
def test_no_such_device(entry: str) -> None:
    name = NAMES[operator_of(entry)]
    message = f"{name} is not implemented on DLPack device type 8:0"
    expect(entry, (all_on(entry, METAL, 0), NotImplementedError, message))


@pytest.mark.parametrize("entry", ON_DEVICE)
@pytest.mark.parametrize(("backend", "device"), [("cuda", "cuda:0"), ("ascend", "npu:3")])
def test_no_backend(entry: str, backend: str, device: str) -> None:
    found = {b.name: b for b in runtime.backends()}[backend]
    if found.available:
        pytest.skip("this installation has it, and would take the memory to be the device's")
    number = (CUDA, 0) if backend == "cuda" else (EXT_DEV, 3)
    message = (
        f"{NAMES[operator_of(entry)]} is not available on {device}: this installation has no "
        f"usable {backend} backend ({found.description})"
    )
    expect(entry, (all_on(entry, *number), NotImplementedError, message))


@pytest.mark.parametrize("entry", ON_DEVICE)
def test_page_locked_memory_is_the_hosts(entry: str) -> None:
    arguments = ENTRIES[entry].arguments()
    for name, change in all_on(entry, CUDA_HOST, 0).items():
        arguments[name] = change(arguments[name])
    ENTRIES[entry].function(**arguments)


_CALL_WITHOUT_MEMORY = """
import sys
sys.path[:0] = {path!r}
import torch
import test_errors
arguments = test_errors.ENTRIES[{entry!r}].arguments()
arguments[{argument!r}] = arguments[{argument!r}].clone()
arguments[{argument!r}].untyped_storage().resize_(0)
try:
    test_errors.ENTRIES[{entry!r}].function(**arguments)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        ("prefill", "k_cache"),
        ("prefill", "minblocks"),
        ("out", "query"),
        ("out", "seq_lens"),
        ("out", "out"),
        ("tables", "block_tables"),
        ("tables", "lens_out"),
        ("attention", "v_cache"),
        ("attention", "lse"),
    ],
)
def test_tensor_without_memory(entry: str, argument: str) -> None:
    """A tensor whose storage was given back has an address of zero, as in sharded training."""
    text = _CALL_WITHOUT_MEMORY.format(path=sys.path, entry=entry, argument=argument)
    result = run_python(text)
    assert result.returncode == 0, f"the process died with {result.returncode}"
    shape = list(ENTRIES[entry].arguments()[argument].shape)
    message = f"{named(entry, argument)} must have memory, got a null address for shape {shape}"
    assert result.stdout.splitlines() == [message]


@pytest.mark.parametrize(
    ("entry", "argument"),
    [("prefill", "k_cache"), ("out", "query"), ("tables", "out"), ("attention", "v_cache")],
)
def test_negative_bit(entry: str, argument: str) -> None:
    """torch negates such views lazily: their memory holds other values than they do."""
    message = (
        f"{argument} must hold its values, got a view that torch negates lazily: call resolve_neg()"
    )
    expect(entry, ({argument: torch._neg_view}, ValueError, message))


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        ("prefill", "maxblocks"),
        ("prefill", "minblocks"),
        ("attention", "out"),
        ("attention", "lse"),
    ],
)
def test_output_requires_grad(entry: str, argument: str) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.requires_grad_()

    message = f"{argument} is written and must not require grad"
    expect(entry, ({argument: change}, ValueError, message))


class Shapeless:
    """What speaks DLPack need not have a shape of its own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        ("k", "query"),
        ("k", "maxblocks"),
        ("tables", "selected_indices"),
        ("attention_new", "query"),
    ],
)
def test_no_shape_to_make_a_result_of(entry: str, argument: str) -> None:
    message = f"{argument} of type Shapeless has no shape: pass the output"
    changes = {argument: Shapeless}
    if entry == "tables":
        changes["out"] = value(None)
    expect(entry, (changes, TypeError, message))


def sharing() -> Iterator[tuple[str, str, str]]:
    """Yield every output with every argument that it must not share memory with."""
    for entry in ("prefill", "known", "in_out_w", "tables", "attention"):
        arguments = {n: held for n, held in ENTRIES[entry].arguments().items() if is_tensor(held)}
        written = [name for name in arguments if name in WRITTEN[operator_of(entry)]]
        if operator_of(entry) == "select":
            written = [name for name in (output_of(entry), "workspace") if name in arguments]
        for i, output in enumerate(written):
            for other in arguments:
                # Metadata may lie among the keys.
                is_in_pool = entry == "prefill" and arguments[other].is_floating_point()
                # Of two outputs, the first one is reported.
                if other not in written[: i + 1] and not is_in_pool:
                    yield entry, output, other


@pytest.mark.parametrize(("entry", "output", "other"), list(sharing()))
def test_output_shares_memory(entry: str, output: str, other: str) -> None:
    """One element in common is one too many; none is none."""
    arguments = ENTRIES[entry].arguments()
    written, read = arguments[output], arguments[other]
    size = max(written.element_size(), read.element_size())
    buffer = torch.zeros(written.nbytes + read.nbytes + 64, dtype=torch.uint8)

    def at(start: int, tensor: torch.Tensor) -> torch.Tensor:
        view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return view.copy_(tensor)

    start = -(-read.nbytes // size) * size
    arguments[output] = at(start - size, written)
    arguments[other] = at(0, read)
    before = snapshot(arguments)
    message = (
        f"{named(entry, output)} is written and must not share memory with {named(entry, other)}, "
        "got overlapping addresses"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ENTRIES[entry].function(**arguments)
    assert snapshot(arguments) == before

    arguments[other], arguments[output] = at(0, read), at(start, written)
    ENTRIES[entry].function(**arguments)


# What is no error.


@pytest.mark.parametrize("entry", ENTRIES)
def test_empty_batch(entry: str) -> None:
    arguments = ENTRIES[entry].arguments()
    for name, held in arguments.items():
        of_batch = name not in ("k_cache", "v_cache", "maxblocks", "minblocks", "workspace")
        if is_tensor(held) and of_batch:
            arguments[name] = held[:0]
    before = snapshot(arguments)
    result = ENTRIES[entry].function(**arguments)
    assert snapshot(arguments) == before
    if entry in NEW:
        assert tuple(result.shape) == ((0, 2, 3) if entry == "k" else (0, 6, 8))


@pytest.mark.parametrize("entry", ENTRIES)
def test_empty_everything(entry: str) -> None:
    """No request, no pool, no table columns."""
    arguments = ENTRIES[entry].arguments()
    for name, held in arguments.items():
        if is_tensor(held):
            arguments[name] = held[:0, :0] if name.endswith("block_tables") else held[:0]
    ENTRIES[entry].function(**arguments)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in SIZES])
def test_empty_requests_of_an_empty_pool(entry: str) -> None:
    """Requests without tokens need neither tables nor pools."""
    arguments = ENTRIES[entry].arguments()
    for name, held in arguments.items():
        if name in ("seq_lens", "metadata_seq_lens"):
            held.zero_()
        if name in ("k_cache", "v_cache", "maxblocks", "minblocks"):
            arguments[name] = held[:0]
        if name.endswith("block_tables"):
            arguments[name] = held[:, :0]
    if entry in ("tables", *ATTENTION):
        arguments["selected_indices"].fill_(-1)
    result = ENTRIES[entry].function(**arguments)
    if entry == "k":
        assert (result == -1).all()
    elif entry in ATTENTION:
        assert (result == 0).all()
        assert (arguments.get("lse", torch.tensor(-torch.inf)) == -torch.inf).all()
    elif entry == "tables":
        assert (arguments["out"] == -1).all()
        assert (arguments["lens_out"] == 0).all()
    elif entry != "prefill":
        assert (arguments[output_of(entry)] == -1).all()


HOSTILE = (-1, -(2**31), 2**31 - 1, 4, 6, 1_000_000)


@pytest.mark.parametrize("garbage", HOSTILE)
def test_entries_behind_the_last_block(garbage: int) -> None:
    """Garbage in unread entries changes nothing: the results are those without it."""
    for entry, held in ENTRIES.items():
        if entry == "workspace_size":
            continue
        results = []
        for filler in (0, garbage):
            arguments = held.arguments()
            for name, tensor in arguments.items():
                if name.endswith("block_tables"):
                    tensor[tensor.abs() == GARBAGE] = filler
            result = held.function(**arguments)
            outputs = [arguments[name] for name in arguments if name in WRITTEN[operator_of(entry)]]
            results.append([*outputs, result] if entry == "k" else outputs)
        for plain, hostile in zip(*results, strict=True):
            assert torch.equal(plain, hostile)


@pytest.mark.parametrize("garbage", HOSTILE)
def test_entries_before_an_update(garbage: int) -> None:
    arguments = prefill_arguments()
    arguments["metadata_seq_lens"] = int32([9, 4])
    arguments["block_tables"][0, :2] = garbage
    arguments["block_tables"][1, :1] = garbage
    arguments["metadata_block_tables"][0, :1] = garbage
    quest_prefill_metadata(**arguments)
    written = (arguments["maxblocks"] != POISON).flatten(2).any(-1)
    # Block 2 of request 0 is row 0 of its metadata block, so row 1 is cleared.
    assert written.nonzero().tolist() == [[0, 0], [0, 1], [3, 1]]


@pytest.mark.parametrize("garbage", HOSTILE)
@pytest.mark.parametrize("rows", [1, 2])
def test_entries_of_window_and_sink(garbage: int, rows: int) -> None:
    arguments = select_arguments()
    arguments["maxblocks"] = arguments["maxblocks"][:, :rows]
    arguments["minblocks"] = arguments["minblocks"][:, :rows]
    # 3 blocks of 2 tokens; with one row each, the middle one alone is scored.
    arguments["seq_lens"] = int32([6, 6])
    arguments["metadata_block_tables"] = int32([[garbage, 0, garbage], [garbage, 1, garbage]])
    known = [4, 5] if rows == 1 else [1, 0]
    if rows == 2:
        arguments["metadata_block_tables"].fill_(garbage)
    result = quest_block_select_paged(
        **arguments, k=4, metadata_seq_lens=int32(known), block_size=2
    )
    expected = [2, 0, 1, -1] if rows == 1 else [2, 1, 0, -1]
    assert result.tolist() == [[expected] * 2] * 2


@pytest.mark.parametrize("t", [5, 8, 2**31 - 1, 2**62])
def test_window_beyond_the_table(t: int) -> None:
    """Blocks without metadata need no room in the table."""
    arguments = select_arguments()
    # 7 blocks, of which the table holds 4.
    arguments["seq_lens"] = int32([3, 13])
    result = quest_block_select_paged(**arguments, k=9, tokens_since_metadata_update=t)
    selected = result[1].tolist()
    first_of_window = max(13 - t, 0) // 2
    forced = list(range(6, first_of_window - 1, -1))
    if 0 not in forced:
        forced.append(0)
    for row in selected:
        assert row[: len(forced)] == forced
        assert sorted(row) == [-1, -1, *range(7)]


def test_longest_request_of_only_a_window() -> None:
    arguments = select_arguments()
    arguments["seq_lens"] = int32([2**31 - 1, 0])
    arguments["metadata_block_tables"] = arguments["metadata_block_tables"][:, :0]
    result = quest_block_select_paged(**arguments, k=2, metadata_seq_lens=int32([0, 0]))
    assert result.tolist() == [[[2**30 - 1, 2**30 - 2]] * 2, [[-1, -1]] * 2]


@pytest.mark.parametrize("k", [True, np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_integers_of_other_types(k: Any) -> None:
    assert quest_block_select_paged(**select_arguments(), k=k).shape == (2, 2, int(k))


@pytest.mark.parametrize(
    "scale", [1, True, np.float32(1), np.float64(1), torch.tensor(1.0)], ids=repr
)
def test_numbers_of_other_types(scale: Any) -> None:
    expected = paged_select_attention(**attention_arguments(), scale=1.0)
    assert torch.equal(paged_select_attention(**attention_arguments(), scale=scale), expected)


def test_the_largest_scale() -> None:
    arguments = attention_arguments()
    arguments["query"].zero_()
    expected = paged_select_attention(**arguments)
    assert torch.equal(paged_select_attention(**arguments, scale=2e38), expected)


@pytest.mark.parametrize(
    ("outs", "lses", "kind", "message"),
    [
        ([], [], ValueError, "expected as many lses as outs, at least one, got 0 and 0"),
        ([(2, 3)], [], ValueError, "expected as many lses as outs, at least one, got 0 and 1"),
        ([()], [()], ValueError, "outs[0] must be [..., D], got []"),
        ([(2, 3), (2, 4)], [(2,)] * 2, ValueError, "outs[1] must be [2, 3], got [2, 4]"),
        ([(2, 3)], [(3,)], ValueError, "lses[0] must be [2], got [3]"),
        ([(2, 3)], [None], TypeError, "lses[0] must be a tensor, got NoneType"),
        ([7], [(3,)], TypeError, "outs[0] must be a tensor, got int"),
        (None, [(3,)], TypeError, "outs must be a sequence of tensors, got NoneType"),
        ([(3,)], 3, TypeError, "lses must be a sequence of tensors, got int"),
        (torch.zeros(2, 3, 4), [(2,)], TypeError, "outs must be a sequence of tensors, got Tensor"),
        (
            [(2, 3)],
            np.zeros((1, 2), np.float32),
            TypeError,
            "lses must be a sequence of tensors, got ndarray",
        ),
        (
            [(2, 3), np.zeros((2, 3), np.float32)],
            [(2,)] * 2,
            TypeError,
            "outs[1] must be a torch tensor like outs[0], got ndarray",
        ),
        (
            [np.zeros((2, 3), np.float32)],
            [(2,)],
            TypeError,
            "lses[0] must be a NumPy array like outs[0], got Tensor",
        ),
        (
            [(2, 3), torch.zeros(2, 3).to_sparse()],
            [(2,)] * 2,
            TypeError,
            "outs[1] must be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            [torch.zeros(2, 3, dtype=torch.int64)],
            [(2,)],
            TypeError,
            "outs[0] must be float16, bfloat16 or float32, got int64",
        ),
        (
            [np.zeros((2, 3))],
            [np.zeros(2, np.float32)],
            TypeError,
            "outs[0] must be float16, bfloat16 or float32, got float64",
        ),
        (
            [(2, 3), torch.zeros(2, 3).bfloat16()],
            [(2,)] * 2,
            TypeError,
            "outs[1] must be float32 like outs[0], got bfloat16",
        ),
        (
            [torch.zeros(2, 3).half()],
            [torch.zeros(2).half()],
            TypeError,
            "lses[0] must be float32, got float16",
        ),
        (
            [(2, 3)],
            [torch.zeros(2, device="meta")],
            ValueError,
            "lses[0] must be on cpu like outs[0], got meta",
        ),
    ],
)
def test_states_that_do_not_merge(
    outs: Any, lses: Any, kind: type[Exception], message: str
) -> None:
    def made(shapes: Any) -> Any:
        if not isinstance(shapes, list):
            return shapes
        return [torch.zeros(shape) if isinstance(shape, tuple) else shape for shape in shapes]

    assert is_documented(message)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        merge_attention_states(made(outs), made(lses))


@pytest.mark.parametrize("folder", ["integrations", "recall"])
def test_texts_of_the_source_are_documented(folder: str) -> None:
    """All of them, also those that no test provokes."""
    files = sorted(Path(select_attn_ops.__file__).parent.joinpath(folder).glob("*.py"))
    texts = [text for file in files for text in raised_texts(file)]
    assert len(texts) >= 20
    assert [text for text in texts if not is_documented(text)] == []


def test_a_call_after_errors_is_right() -> None:
    expected = quest_block_select_paged(**select_arguments(), k=3)
    for name in ("negative_length", "block_beyond_the_pool"):
        expect("k", SELECT_VALUES[name])
        assert torch.equal(quest_block_select_paged(**select_arguments(), k=3), expected)


# The runtime.


@pytest.mark.parametrize(
    ("count", "kind", "message"),
    [
        (0, ValueError, "the number of threads must be in [1, 65536], got 0"),
        (-1, ValueError, "the number of threads must be in [1, 65536], got -1"),
        (65537, ValueError, "the number of threads must be in [1, 65536], got 65537"),
        (2.0, TypeError, "count must be an integer, got float"),
        (None, TypeError, "count must be an integer, got NoneType"),
        ("2", TypeError, "count must be an integer, got str"),
    ],
)
def test_set_num_threads(count: Any, kind: type[Exception], message: str) -> None:
    before = select_attn_ops.get_num_threads()
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        select_attn_ops.set_num_threads(count)
    assert select_attn_ops.get_num_threads() == before


@pytest.mark.parametrize("name", ["", "avx2", "NEON", 3])
def test_set_simd_target(name: Any) -> None:
    before = runtime.simd_target()
    message = f"the SIMD target must be one of {', '.join(runtime.simd_targets())}, got {name}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        runtime.set_simd_target(name)
    assert runtime.simd_target() == before


def run_python(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


_CALLS = """
import sys
sys.modules["torch"] = None  # for a quick start
import numpy as np
import select_attn_ops
from select_attn_ops import runtime

def empty(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)

pool = empty(1, 2, 1, 1, dtype=np.float16)
selection = np.full((0, 1, 1), -1, np.int32)
calls = [
    select_attn_ops.get_num_threads if {threads} else runtime.simd_target,
    runtime.backends,
    lambda: select_attn_ops.quest_prefill_metadata(
        pool, empty(0, 0), empty(0), empty(0, 0), pool.copy(), pool.copy()
    ),
    lambda: select_attn_ops.quest_block_select_paged(
        empty(0, 1, 1, dtype=np.float16), pool, pool, empty(0, 0), empty(0), 1
    ),
    lambda: select_attn_ops.selected_block_tables(selection, empty(0, 0), empty(0), block_size=1),
    lambda: select_attn_ops.paged_select_attention(
        empty(0, 1, 1, dtype=np.float16), pool, pool, empty(0, 0), empty(0), selection
    ),
]
for call in calls * 2:
    try:
        call()
        print("no error")
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize(
    "text", ["0", "-1", "65537", "two", "2x", "1.5", "1e3", "99999999999999999999", " "]
)
def test_bad_number_of_threads_in_the_environment(text: str) -> None:
    """Every call reports it; the import does not."""
    result = run_python(_CALLS.format(threads=True), SELECT_ATTN_NUM_THREADS=text)
    message = f"SELECT_ATTN_NUM_THREADS must be in [1, 65536], got {text}"
    assert result.stdout.splitlines() == [message] * 12, result.stderr


@pytest.mark.parametrize("text", ["avx2", "NEON", "AVX2,SSE4", "0"])
def test_bad_simd_target_in_the_environment(text: str) -> None:
    result = run_python(_CALLS.format(threads=False), SELECT_ATTN_SIMD_TARGET=text)
    names = ", ".join(runtime.simd_targets())
    message = f"SELECT_ATTN_SIMD_TARGET must be one of {names}, got {text}"
    assert result.stdout.splitlines() == [message] * 12, result.stderr


def test_bad_parallel_setting_in_the_environment() -> None:
    result = run_python(
        """
import numpy as np
import select_attn_ops

for _ in range(2):
    try:
        select_attn_ops.selected_block_tables(
            np.zeros((0, 1, 1), np.int32), np.zeros((0, 0), np.int32), np.zeros(0, np.int32),
            block_size=1,
        )
    except ValueError as error:
        print(error)
""",
        SELECT_ATTN_PARALLEL="tbb",
    )
    message = "SELECT_ATTN_PARALLEL must be openmp or pool, got tbb"
    assert result.stdout.splitlines() == [message] * 2, result.stderr


def test_good_environment() -> None:
    for variables in (
        {"SELECT_ATTN_NUM_THREADS": "3", "SELECT_ATTN_SIMD_TARGET": runtime.simd_targets()[-1]},
        {
            "SELECT_ATTN_NUM_THREADS": "",
            "SELECT_ATTN_SIMD_TARGET": "",
            "SELECT_ATTN_PARALLEL": "",
        },
        {"SELECT_ATTN_PARALLEL": "pool"},
        {"SELECT_ATTN_PARALLEL": "openmp"},
    ):
        result = run_python(_CALLS.format(threads=True), **variables)
        assert result.stdout.splitlines() == ["no error"] * 12, result.stderr

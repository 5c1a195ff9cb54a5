"""What users would run without this library: the same results by torch, and by peers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SelectionProblem:
    """A selection, prepared for torch; what no call would have to do anew is done here."""

    query: torch.Tensor
    """``[B, H, D]``."""
    maxblocks: torch.Tensor
    minblocks: torch.Tensor
    """``[num_metadata_blocks, R, N, D]``."""
    tables: torch.Tensor
    """``[B, MMBPR]``, all of it valid; for requests of equal lengths."""
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Per row of a ragged batch: metadata block, row in it, request, number in the request."""
    longest: int
    """Rows of the longest request."""
    forced: torch.Tensor | None
    """``[B, longest]``: the blocks of window and sink."""
    k: int


@dataclass(frozen=True)
class MetadataProblem:
    """A metadata pass, prepared for torch."""

    k_cache: torch.Tensor
    """``[num_kv_blocks, block_size, N, D]``."""
    kv_blocks: torch.Tensor
    """The KV blocks of all requests, in order."""
    metadata_blocks: torch.Tensor
    metadata_rows: torch.Tensor
    """Where the row of each goes."""
    maxblocks: torch.Tensor
    minblocks: torch.Tensor


@dataclass(frozen=True)
class TablesProblem:
    """A selection to be turned into block tables."""

    selected_indices: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    block_size: int


@dataclass(frozen=True)
class AttentionProblem:
    """Attention over whole blocks, each KV head's own."""

    query: torch.Tensor
    """``[B, H, D]``."""
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    """``[num_kv_blocks, block_size, N, D]``."""
    places: torch.Tensor
    """``[B, N, k]``, blocks of the pool."""


def scores(p: SelectionProblem) -> torch.Tensor:
    """Scores of all blocks, ``[B, N, longest]``, float32; infinite where a block is forced."""
    batch, num_heads, head_dim = p.query.shape
    num_kv_heads = p.maxblocks.shape[2]
    groups = p.query.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mean = groups.float().mean(2)
    if p.rows is None:
        query = mean[:, None, None]
        maxima, minima = p.maxblocks[p.tables], p.minblocks[p.tables]
        each = torch.maximum(query * maxima.float(), query * minima.float()).sum(-1)
        result = each.flatten(1, 2)
    else:
        block, row, request, number = p.rows
        query = mean[request]
        maxima, minima = p.maxblocks[block, row], p.minblocks[block, row]
        each = torch.maximum(query * maxima.float(), query * minima.float()).sum(-1)
        result = each.new_full((batch, p.longest, num_kv_heads), float("-inf"))
        result[request, number] = each
    if p.forced is not None:
        result = result.masked_fill(p.forced[..., None], float("inf"))
    return result.transpose(1, 2)


def select(p: SelectionProblem) -> torch.Tensor:
    """`quest_block_select_paged`, but for the order of ties."""
    return scores(p).topk(p.k).indices.int()


def prefill_metadata(p: MetadataProblem) -> None:
    """`quest_prefill_metadata`."""
    keys = p.k_cache[p.kv_blocks]
    p.maxblocks[p.metadata_blocks, p.metadata_rows] = keys.amax(1)
    p.minblocks[p.metadata_blocks, p.metadata_rows] = keys.amin(1)


def block_tables(p: TablesProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """`selected_block_tables` of a selection without padding."""
    ordered = p.selected_indices.sort(-1).values
    tables = p.block_tables.gather(1, ordered.flatten(1).long()).view_as(ordered)
    tokens = p.seq_lens[:, None, None] - ordered * p.block_size
    return tables, tokens.clamp(max=p.block_size).sum(-1, dtype=torch.int32)


def attend(p: AttentionProblem) -> torch.Tensor:
    """`paged_select_attention`, with a copy of what is selected."""
    head = torch.arange(p.places.shape[1], device=p.places.device)[:, None]
    keys, values = (cache[p.places, :, head].flatten(2, 3) for cache in (p.k_cache, p.v_cache))
    return attend_densely(p.query, keys, values)


def attend_densely(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of ``[B, H, D]`` to keys and values ``[B, N, tokens, D]``.

    The heads of a group take the place of query tokens, so that keys are read once for all.
    """
    groups = query.view(len(query), keys.shape[1], -1, query.shape[2])
    result = torch.nn.functional.scaled_dot_product_attention(groups, keys, values)
    return result.flatten(1, 2)


FUNCTIONS: dict[type, Callable[[Any], object]] = {
    SelectionProblem: select,
    MetadataProblem: prefill_metadata,
    TablesProblem: block_tables,
    AttentionProblem: attend,
}
"""torch's way to solve each kind of problem."""


class UnavailableError(RuntimeError):
    """An alternative cannot be measured here; the text says why."""


class OtherWorkError(UnavailableError):
    """An alternative does not do such work at all: nobody expects it to be measured."""


Prepare = Callable[[Sequence[Any]], Sequence[Callable[[], object]]]
"""Makes calls that solve problems of one kind, or raises `UnavailableError`."""

PEERS: dict[str, Prepare] = {}
"""Other libraries by name, to be measured beside torch; `peers.load` finds them."""


def _flashinfer(problems: Sequence[Any]) -> list[Callable[[], object]]:
    if not isinstance(problems[0], SelectionProblem):
        raise OtherWorkError("it has nothing like it")
    try:
        top_k = importlib.import_module("flashinfer").top_k
    except Exception as error:  # absent, or without what it compiles with
        raise UnavailableError(_first_line(error)) from error

    def select(p: SelectionProblem) -> object:
        return top_k(scores(p).flatten(0, 1).contiguous(), p.k, sorted=True)

    try:
        select(problems[0])
    except Exception as error:
        raise UnavailableError(_first_line(error)) from error
    return [functools.partial(select, problem) for problem in problems]


CUDA_PEERS: dict[str, Prepare] = {"torch and FlashInfer's top-k": _flashinfer}
"""The same, on CUDA devices only."""

_compiled: dict[type, Callable[[Any], object]] = {}


def _eager(problems: Sequence[Any]) -> list[Callable[[], object]]:
    function = FUNCTIONS[type(problems[0])]
    return [functools.partial(function, problem) for problem in problems]


def _compile(problems: Sequence[Any]) -> list[Callable[[], object]]:
    kind = type(problems[0])
    if kind not in _compiled:
        # By default torch gives up after a few shapes.
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        _compiled[kind] = torch.compile(FUNCTIONS[kind], dynamic=True)
    function = _compiled[kind]
    try:
        function(problems[0])
    except Exception as error:  # a compiler that is absent or fails, in any of many ways
        raise UnavailableError(_first_line(error)) from error
    return [functools.partial(function, problem) for problem in problems]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def alternatives(compiled: bool, device: torch.device) -> dict[str, Prepare]:
    """What to measure beside an operator: torch eager and, if wanted, compiled, and all peers."""
    found: dict[str, Prepare] = {"torch": _eager}
    if compiled:
        found["torch.compile"] = _compile
    return found | PEERS | (CUDA_PEERS if device.type == "cuda" else {})

"""paged_select_attention on the KV caches of engines, laid out as they do it, without a copy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from common.compare import assert_attention_matches
from gen_data_paged_select_attention import AttentionInputs, gen_data_paged_select_attention
from ref_paged_select_attention import paged_select_attention_ref
from select_attn_ops import paged_select_attention


@dataclass
class EngineCache:
    """A cache as an engine holds it, and what it passes to the operator.

    Parameters
    ----------
    stored : list of torch.Tensor
        The engine's own tensors, over their whole storage.
    k_cache, v_cache : torch.Tensor
        ``[num_kv_blocks, block_size, num_kv_heads, head_dim]``.
    block_tables : callable
        Makes the operator's table out of one of physical blocks in ``k_cache``.
    """

    stored: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: Callable[[torch.Tensor], torch.Tensor] = lambda tables: tables


# (blocks, tokens per block, KV heads, channels, dtype) -> EngineCache
Build = Callable[[int, int, int, int, torch.dtype], EngineCache]


def vllm_nhd(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make vLLM's to early 2026, K and V one after the other."""
    kv = torch.empty(2, nb, bs, heads, dim, dtype=dtype)
    return EngineCache([kv], kv[0], kv[1])


def vllm_hnd(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make the same with heads outside tokens in memory."""
    kv = torch.empty(2, nb, heads, bs, dim, dtype=dtype)
    seen = kv.permute(0, 1, 3, 2, 4)
    return EngineCache([kv], seen[0], seen[1])


def vllm_flashinfer(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make vLLM's for FlashInfer, K and V of a block side by side."""
    kv = torch.empty(nb, 2, bs, heads, dim, dtype=dtype)
    return EngineCache([kv], kv[:, 0], kv[:, 1])


def vllm_late_2026(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make vLLM's with K and V in the halves of a row."""
    kv = torch.empty(nb, heads, bs, 2 * dim, dtype=dtype)
    return EngineCache([kv], kv[..., :dim].transpose(1, 2), kv[..., dim:].transpose(1, 2))


def vllm_late_2026_nhd(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make the same with tokens outside heads in memory."""
    kv = torch.empty(nb, bs, heads, 2 * dim, dtype=dtype)
    return EngineCache([kv], kv[..., :dim], kv[..., dim:])


def vllm_late_2026_layers(
    nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype
) -> EngineCache:
    """Make the same with the layers of a block side by side; this is the second of three."""
    kv = torch.empty(nb, 3, heads, bs, 2 * dim, dtype=dtype)
    layer = kv[:, 1]
    return EngineCache([kv], layer[..., :dim].transpose(1, 2), layer[..., dim:].transpose(1, 2))


def vllm_ascend(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make vllm-ascend's, a tuple."""
    k, v = (torch.empty(nb, bs, heads, dim, dtype=dtype) for _ in range(2))
    return EngineCache([k, v], k, v)


def sglang(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make SGLang's, which counts in slots of a token; so does its table."""
    k, v = (torch.empty(nb * bs, heads, dim, dtype=dtype) for _ in range(2))

    def from_req_to_token(tables: torch.Tensor) -> torch.Tensor:
        req_to_token = (tables[..., None].long() * bs + torch.arange(bs)).flatten(1).int()
        return req_to_token[:, ::bs] // bs

    return EngineCache(
        [k, v], k.unflatten(0, (-1, bs)), v.unflatten(0, (-1, bs)), from_req_to_token
    )


def flashinfer_nhd(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make FlashInfer's or Quest's, with its CSR table."""
    kv = torch.empty(nb, 2, bs, heads, dim, dtype=dtype)

    def from_csr(tables: torch.Tensor) -> torch.Tensor:
        batch, columns = tables.shape
        indices, indptr = tables.flatten(), torch.arange(batch + 1) * columns
        pages = indptr[1:] - indptr[:-1]
        made = torch.zeros(batch, columns, dtype=torch.int32)
        made[torch.arange(columns) < pages[:, None]] = indices
        return made

    return EngineCache([kv], kv[:, 0], kv[:, 1], from_csr)


def flashinfer_hnd(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make the same with heads outside tokens."""
    kv = torch.empty(nb, 2, heads, bs, dim, dtype=dtype)
    return EngineCache([kv], kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2))


def transformers(nb: int, bs: int, heads: int, dim: int, dtype: torch.dtype) -> EngineCache:
    """Make that of Hugging Face transformers for one request, paged by striding."""
    k, v = (torch.empty(1, heads, nb * bs, dim, dtype=dtype) for _ in range(2))

    def paged(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided((nb, bs, heads, dim), (bs * dim, dim, nb * bs * dim, 1))

    return EngineCache([k, v], paged(k), paged(v))


ENGINES: dict[str, Build] = {
    build.__name__: build
    for build in (
        vllm_nhd,
        vllm_hnd,
        vllm_flashinfer,
        vllm_late_2026,
        vllm_late_2026_nhd,
        vllm_late_2026_layers,
        vllm_ascend,
        sglang,
        flashinfer_nhd,
        flashinfer_hnd,
        transformers,
    )
}


def fill(cache: EngineCache, inputs: AttentionInputs) -> None:
    """Store keys and values as `inputs` has them, NaN everywhere else."""
    for tensor in cache.stored:
        tensor.fill_(float("nan"))
    cache.k_cache.copy_(inputs.k_cache)
    cache.v_cache.copy_(inputs.v_cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_engine_cache(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is right, and what the library gets is the engine's own memory."""
    inputs = gen_data_paged_select_attention([330, 200], 12, head_dim=48, dtype=dtype)
    cache = ENGINES[name](len(inputs.k_cache), 16, 2, 48, dtype)
    fill(cache, inputs)
    # A query is a slice of a packed QKV, a table one of a wider table.
    qkv = torch.full((2, 8 + 2 * 2, 48), float("nan"), dtype=dtype)
    qkv[:, :8] = inputs.query
    wide = torch.full((2, 100), 2**31 - 1, dtype=torch.int32)
    tables = wide[:, : inputs.block_tables.shape[1]]
    tables.copy_(cache.block_tables(inputs.block_tables))
    passed: list[tuple[Any, ...]] = []
    # By its name, which the package has for the function.
    module = importlib.import_module("select_attn_ops.paged_select_attention")
    call = module.LIB.paged_select_attention

    def record(*arguments: Any) -> None:
        passed.append(arguments)
        call(*arguments)

    monkeypatch.setattr(module, "LIB", LibraryWith(record))
    query = qkv[:, :8]
    lse = torch.empty(2, 8)
    out = paged_select_attention(
        query,
        cache.k_cache,
        cache.v_cache,
        tables,
        inputs.seq_lens,
        inputs.selected_indices,
        lse=lse,
    )
    reference = paged_select_attention_ref(*inputs.positional)
    assert reference.out_error.isfinite().all()
    assert_attention_matches(out, lse, reference)

    (arguments,) = passed
    for given, expected in zip(
        arguments[:4], (query, cache.k_cache, cache.v_cache, tables), strict=True
    ):
        assert given is expected, "the library must get the tensor itself"
    stored = {tensor.untyped_storage().data_ptr() for tensor in cache.stored}
    for view in (cache.k_cache, cache.v_cache):
        assert view.untyped_storage().data_ptr() in stored


@dataclass
class LibraryWith:
    """The library with another function in place of the operator."""

    paged_select_attention: Callable[..., None]


def resident_bytes() -> int:
    """Return the memory that the process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ENGINES)
def test_engine_cache_is_not_copied(name: str) -> None:
    """Of a large cache only the selected blocks become resident."""
    blocks, heads, dim, block_size = 4096, 4, 64, 32
    cache = ENGINES[name](blocks, block_size, heads, dim, torch.float32)  # not yet in memory
    size = cache.k_cache.numel() * cache.k_cache.element_size()
    tables = torch.arange(blocks, dtype=torch.int32)[None]
    arguments = (
        torch.ones(1, 8, dim),
        cache.k_cache,
        cache.v_cache,
        cache.block_tables(tables),
        torch.tensor([blocks * block_size], dtype=torch.int32),
        torch.tensor([0, 100, 4095], dtype=torch.int32).expand(1, heads, 3),
    )
    before = resident_bytes()
    paged_select_attention(*arguments)
    assert resident_bytes() - before < size / 16

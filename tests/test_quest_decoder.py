"""QuestDecoder: decode loops of an engine that shares, frees and hands on KV blocks."""

from __future__ import annotations

import copy
import random
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from error_texts import is_documented
from hypothesis import given, settings
from hypothesis import strategies as st
from select_attn_ops import QuestDecoder, quest_block_select_paged

NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 16
NUM_HEADS = NUM_KV_HEADS * GROUP


@dataclass
class Engine:
    """A paged cache of one layer with an allocator, and the decoder beside it."""

    block_size: int
    num_kv_blocks: int = 64
    max_blocks: int = 12
    dtype: torch.dtype = torch.float32
    requests: list[list[int]] = field(default_factory=list)
    """The blocks of each request."""
    lens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (2, self.num_kv_blocks, self.block_size, NUM_KV_HEADS, HEAD_DIM)
        # What a block held before is of no concern to anybody.
        self.k_cache, self.v_cache = torch.full(shape, float("nan"), dtype=self.dtype)
        self.free = list(range(self.num_kv_blocks))
        random.Random(self.block_size).shuffle(self.free)

    def decoder(self, k: int, **options: object) -> QuestDecoder:
        decoder = QuestDecoder(
            self.k_cache,
            self.v_cache,
            num_heads=NUM_HEADS,
            k=k,
            max_batch=8,
            max_blocks=self.max_blocks,
            **options,  # type: ignore[arg-type]
        )
        # As if other requests had been there before.
        decoder.maxblocks.fill_(float("nan"))
        decoder.minblocks.fill_(float("nan"))
        return decoder

    def append(self, request: int, tokens: int) -> None:
        for _ in range(tokens):
            position = self.lens[request]
            if position % self.block_size == 0:
                self.requests[request].append(self.free.pop())
            place = (self.requests[request][-1], position % self.block_size)
            self.k_cache[place] = torch.randn(NUM_KV_HEADS, HEAD_DIM).to(self.dtype)
            self.v_cache[place] = torch.randn(NUM_KV_HEADS, HEAD_DIM).to(self.dtype)
            self.lens[request] += 1

    def admit(self, tokens: int, shared_with: int | None = None, shared_blocks: int = 0) -> int:
        prefix = [] if shared_with is None else self.requests[shared_with][:shared_blocks]
        self.requests.append(list(prefix))
        self.lens.append(len(prefix) * self.block_size)
        self.append(len(self.lens) - 1, tokens - self.lens[-1])
        return len(self.lens) - 1

    def cut(self, request: int, tokens: int) -> None:
        """Take tokens back, and the blocks that they alone are in."""
        self.lens[request] = tokens
        blocks = self.requests[request]
        while len(blocks) > -(-tokens // self.block_size):
            self.free.append(blocks.pop())

    def finish(self, request: int) -> None:
        others = {b for i, blocks in enumerate(self.requests) if i != request for b in blocks}
        self.free += [block for block in self.requests[request] if block not in others]
        del self.requests[request], self.lens[request]

    def tables(self) -> torch.Tensor:
        table = torch.full((len(self.requests), self.max_blocks), -7, dtype=torch.int32)
        for row, blocks in zip(table, self.requests, strict=True):
            row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return table

    def seq_lens(self) -> torch.Tensor:
        return torch.tensor(self.lens, dtype=torch.int32)

    def tokens(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a request, ``[tokens, N, D]``, float64."""
        blocks, length = self.requests[request], self.lens[request]
        return tuple(
            cache[blocks].flatten(0, 1)[:length].double() for cache in (self.k_cache, self.v_cache)
        )  # type: ignore[return-value]


def expected_step(engine: Engine, query: torch.Tensor, k: int, recent_blocks: int) -> torch.Tensor:
    """What a step must give, from the keys and values alone."""
    size = engine.block_size
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b, length in enumerate(engine.lens):
        keys, values = engine.tokens(b)
        full = length // size
        total = -(-length // size)
        forced = list(range(max(full - recent_blocks, 0), total))[::-1]
        forced += [0] if total and 0 not in forced else []
        for n in range(NUM_KV_HEADS):
            heads = slice(n * GROUP, (n + 1) * GROUP)
            q = query[b, heads].double()
            mean = q.mean(0)
            blocks = keys[: full * size, n].view(full, size, HEAD_DIM)
            bound = torch.maximum(mean * blocks.amax(1), mean * blocks.amin(1)).sum(-1)
            ranked = [j for j in bound.argsort(descending=True).tolist() if j not in forced]
            chosen = (forced + ranked)[:k]
            at = [t for j in chosen for t in range(j * size, min((j + 1) * size, length))]
            weights = (q @ keys[at, n].T * HEAD_DIM**-0.5).softmax(-1)
            out[b, heads] = weights @ values[at, n]
    return out


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 3),
    st.booleans(),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_decodes(
    block_size: int, k: int, recent_blocks: int, in_chunks: bool, prompts: list[int]
) -> None:
    torch.manual_seed(block_size)
    engine = Engine(block_size, num_kv_blocks=256, max_blocks=64)
    decoder = engine.decoder(k, recent_blocks=recent_blocks)
    for tokens in prompts:
        engine.admit(tokens)
    if in_chunks:
        decoder.prefill(engine.tables(), engine.seq_lens())
        before = engine.seq_lens()
        for request in range(len(prompts)):
            engine.append(request, 7 * request)
        decoder.update(engine.tables(), engine.seq_lens(), before)
    else:
        decoder.prefill(engine.tables(), engine.seq_lens())
    for _ in range(2 * block_size + 1):
        for request in range(len(prompts)):
            engine.append(request, 1)
        query = torch.randn(len(prompts), NUM_HEADS, HEAD_DIM)
        out = decoder.step(query, engine.tables(), engine.seq_lens())
        expected = expected_step(engine, query, k, recent_blocks)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_requests_come_and_go() -> None:
    """Shared prefixes, and blocks that belonged to others, need no word to the decoder."""
    torch.manual_seed(0)
    engine = Engine(4, num_kv_blocks=40)
    decoder = engine.decoder(3)
    draw = random.Random(0)
    served = 0
    for _ in range(120):
        if len(engine.lens) < 3 and len(engine.free) > 14:
            shared = draw.choice([None, *range(len(engine.lens))])
            blocks = 0 if shared is None else engine.lens[shared] // 4
            tokens = blocks * 4 + draw.randint(1, 9)
            if tokens < 40:
                request = engine.admit(tokens, shared, blocks)
                decoder.prefill(engine.tables()[request:], engine.seq_lens()[request:])
                served += 1
        for request in reversed(range(len(engine.lens))):
            if engine.lens[request] >= 44 or (len(engine.lens) > 1 and draw.random() < 0.05):
                engine.finish(request)
        if not engine.lens:
            continue
        for request in range(len(engine.lens)):
            engine.append(request, 1)
        query = torch.randn(len(engine.lens), NUM_HEADS, HEAD_DIM)
        out = decoder.step(query, engine.tables(), engine.seq_lens())
        expected = expected_step(engine, query, 3, 1)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert served > 5


def loaded(block_size: int = 4, k: int = 3, **options: object) -> tuple[Engine, QuestDecoder]:
    """An engine in the middle of its work."""
    torch.manual_seed(0)
    engine = Engine(block_size)
    decoder = engine.decoder(k, **options)
    for tokens in (37, 5, 20):
        engine.admit(tokens)
    decoder.prefill(engine.tables(), engine.seq_lens())
    for request in range(3):
        engine.append(request, 1)
    return engine, decoder


def test_copy_has_its_own_memory() -> None:
    engine, decoder = loaded()
    copied = copy.deepcopy(decoder)
    arguments = (torch.randn(3, NUM_HEADS, HEAD_DIM), engine.tables(), engine.seq_lens())
    expected = decoder.step(*arguments).clone()
    # What was the first one's cache is anybody's memory to the copy.
    out = engine.k_cache.view(-1)[: expected.numel()].view_as(expected)
    assert torch.equal(copied.step(*arguments, out=out), expected)
    with pytest.raises(ValueError, match="out is written and must not share memory with k_cache"):
        decoder.step(*arguments, out=out)


def test_selects_as_the_operator() -> None:
    engine, decoder = loaded()
    tables, seq_lens = engine.tables(), engine.seq_lens()
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    decoder.update(tables, seq_lens)
    selected = decoder.select(query, tables, seq_lens)
    expected = quest_block_select_paged(
        query,
        decoder.maxblocks,
        decoder.minblocks,
        tables,
        seq_lens,
        3,
        metadata_seq_lens=torch.tensor([32, 0, 16], dtype=torch.int32),
        block_size=4,
    )
    assert torch.equal(selected, expected)


@pytest.mark.parametrize("max_seq_len", [38, 40])
def test_dense_path(max_seq_len: int) -> None:
    engine, decoder = loaded(dense_below=40)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    out = decoder.step(query, engine.tables(), engine.seq_lens(), max_seq_len=max_seq_len)
    torch.testing.assert_close(
        out.double(), expected_step(engine, query, 99, 0), rtol=1e-4, atol=1e-5
    )


def test_the_dense_path_keeps_the_metadata_up_to_date() -> None:
    engine, decoder = loaded(dense_below=48)
    for turn in range(9):
        for request in range(3):
            engine.append(request, turn > 0)
        query = torch.randn(3, NUM_HEADS, HEAD_DIM)
        decoder.step(query, engine.tables(), engine.seq_lens(), max_seq_len=48)
    out = decoder.step(query, engine.tables(), engine.seq_lens())
    torch.testing.assert_close(
        out.double(), expected_step(engine, query, 3, 1), rtol=1e-4, atol=1e-5
    )


def test_beyond_dense_below_it_selects() -> None:
    engine, decoder = loaded(dense_below=20)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    out = decoder.step(query, engine.tables(), engine.seq_lens(), max_seq_len=38)
    torch.testing.assert_close(
        out.double(), expected_step(engine, query, 3, 1), rtol=1e-4, atol=1e-5
    )


def test_a_wrong_max_seq_len() -> None:
    engine, decoder = loaded(dense_below=40)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    with pytest.raises(
        ValueError, match=r"^seq_lens\[0\] must be at most 37, max_seq_len, got 38$"
    ):
        decoder.step(query, engine.tables(), engine.seq_lens(), max_seq_len=37)


def test_slots_without_tokens() -> None:
    engine, decoder = loaded()
    tables = torch.cat([engine.tables(), torch.full((1, engine.max_blocks), -7).int()])
    seq_lens = torch.cat([engine.seq_lens(), torch.zeros(1).int()])
    query = torch.randn(4, NUM_HEADS, HEAD_DIM)
    for options in ({}, {"max_seq_len": 1}):
        if options:
            seq_lens = torch.zeros(4).int()
        out = decoder.step(query, tables, seq_lens, **options)  # type: ignore[arg-type]
        assert not out[seq_lens == 0].any()
        assert bool(out.isfinite().all())


def test_outputs() -> None:
    engine, decoder = loaded()
    arguments = (torch.randn(3, NUM_HEADS, HEAD_DIM), engine.tables(), engine.seq_lens())
    first = decoder.step(*arguments)
    kept = first.clone()
    out, lse = torch.full((2, 3, NUM_HEADS, HEAD_DIM), float("nan")).unbind()
    lse = torch.full((3, NUM_HEADS), float("nan"))
    assert decoder.step(*arguments, out=out, lse=lse) is out
    assert torch.equal(out, kept)
    assert bool(lse.isfinite().all())
    assert decoder.step(*arguments).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    engine = Engine(4, dtype=dtype)
    decoder = engine.decoder(99, scale=0.5)
    engine.admit(30)
    decoder.prefill(engine.tables(), engine.seq_lens())
    query = torch.randn(1, NUM_HEADS, HEAD_DIM).to(dtype)
    out = decoder.step(query, engine.tables(), engine.seq_lens())
    assert out.dtype == dtype
    # The scale of 0.5 is that of HEAD_DIM ** -0.5, 0.25, for queries twice as long.
    expected = expected_step(engine, 2 * query, 99, 1)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recent_blocks", [12, 2**28, 2**29, 2**31, 2**62])
def test_more_recent_blocks_than_there_are(recent_blocks: int) -> None:
    engine, decoder = loaded(recent_blocks=recent_blocks)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    out = decoder.step(query, engine.tables(), engine.seq_lens())
    torch.testing.assert_close(
        out.double(), expected_step(engine, query, 3, 12), rtol=1e-4, atol=1e-5
    )


def test_a_dense_path_beyond_every_length() -> None:
    engine, decoder = loaded(dense_below=2**62)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    out = decoder.step(query, engine.tables(), engine.seq_lens(), max_seq_len=2**40)
    torch.testing.assert_close(
        out.double(), expected_step(engine, query, 99, 0), rtol=1e-4, atol=1e-5
    )


def test_attributes() -> None:
    _, decoder = loaded(recent_blocks=2)
    expected = {
        "num_heads": NUM_HEADS,
        "k": 3,
        "max_batch": 8,
        "max_blocks": 12,
        "block_size": 4,
        "recent_blocks": 2,
        "dense_below": 12,
        "scale": HEAD_DIM**-0.5,
    }
    for name, value in expected.items():
        assert getattr(decoder, name) == value
        with pytest.raises(AttributeError):
            setattr(decoder, name, value)
    assert repr(decoder) == (
        "QuestDecoder([64, 4, 2, 16] float32 on cpu, num_heads=6, k=3, max_batch=8, max_blocks=12, "
        f"recent_blocks=2, dense_below=12, scale=0.25, nbytes={decoder.nbytes})"
    )


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 300), st.integers(1, 7))
def test_memory(block_size: int, k: int, dense_below: int, max_batch: int) -> None:
    """As documented: the metadata's part of the caches, and rows per request."""
    k_cache, v_cache = torch.zeros(2, 16, block_size, 2, 16).half().unbind()
    decoder = QuestDecoder(
        k_cache,
        v_cache,
        num_heads=6,
        k=k,
        max_batch=max_batch,
        max_blocks=1000,
        dense_below=dense_below,
    )
    metadata = 2 * k_cache.nbytes // block_size
    dense_blocks = max(-(-dense_below // block_size), 1)
    buffers = max_batch * (6 * 16 * 2 + 4 * 2 * k + 5 * dense_blocks)
    lens_and_constants = 8 * max_batch + 8 * dense_blocks + 4
    assert decoder.maxblocks.nbytes + decoder.minblocks.nbytes == metadata
    assert decoder.nbytes == metadata + buffers + lens_and_constants


@pytest.mark.parametrize("made_in_inference_mode", [True, False])
def test_inference_mode(made_in_inference_mode: bool) -> None:
    """A decoder made under it works outside of it, and the reverse."""
    with torch.inference_mode(made_in_inference_mode):
        engine, decoder = loaded()
    with torch.inference_mode(not made_in_inference_mode):
        query = torch.randn(3, NUM_HEADS, HEAD_DIM)
        for options in ({}, {"max_seq_len": 38}):
            out = decoder.step(query, engine.tables(), engine.seq_lens(), **options)
            assert bool(out.isfinite().all())


def test_compiles() -> None:
    engine, decoder = loaded()
    tables, lens, query = engine.tables(), engine.seq_lens(), torch.randn(3, NUM_HEADS, HEAD_DIM)
    expected = decoder.step(query, tables, lens).clone()
    compiled = torch.compile(decoder.step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, tables, lens), expected)


def test_an_empty_pool() -> None:
    decoder = QuestDecoder(
        *torch.zeros(2, 0, 4, 2, 16), num_heads=4, k=2, max_batch=2, max_blocks=3
    )
    tables, lens = torch.zeros(2, 3).int(), torch.zeros(2).int()
    decoder.prefill(tables, lens)
    assert not decoder.step(torch.randn(2, 4, 16), tables, lens).any()
    assert decoder.step(torch.randn(0, 4, 16), tables[:0], lens[:0]).shape == (0, 4, 16)


def test_arguments_in_larger_tensors() -> None:
    """Slices of wider tables, of a packed query and of a wider output."""
    engine, decoder = loaded()
    tables, lens = engine.tables(), engine.seq_lens()
    query, lse = torch.randn(3, NUM_HEADS, HEAD_DIM), torch.full((3, NUM_HEADS), float("nan"))
    expected = decoder.step(query, tables, lens, lse=lse).clone()
    packed = torch.randn(3, 2 * NUM_HEADS, 2 * HEAD_DIM)
    packed[:, 1:-5, :HEAD_DIM] = query
    wide = torch.zeros(3, 2 * NUM_HEADS, HEAD_DIM)
    wide_lse = torch.zeros(3, 2 * NUM_HEADS)
    out = decoder.step(
        packed[:, 1:-5, :HEAD_DIM],
        torch.cat([tables, tables], 1)[:, : tables.shape[1]],
        lens,
        out=wide[:, NUM_HEADS:],
        lse=wide_lse[:, :NUM_HEADS],
    )
    assert torch.equal(out, expected)
    assert torch.equal(wide_lse[:, :NUM_HEADS], lse)
    assert not wide[:, :NUM_HEADS].any()
    again = decoder.step(query, tables, lens)  # in its own buffer, as a result may be given back
    assert decoder.step(query, tables, lens, out=again) is again
    assert torch.equal(again, expected)


def cache(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def caches(**options: Any) -> dict[str, torch.Tensor]:
    return {name: cache(4, 4, 2, 16, **options) for name in ("k_cache", "v_cache")}


def fails(kind: type[Exception], message: str) -> Any:
    assert is_documented(message), message
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"k_cache": None}, TypeError, "k_cache must be a tensor, got NoneType"),
        ({"v_cache": [1.0]}, TypeError, "v_cache must be a tensor, got list"),
        (
            {"k_cache": np.zeros((4, 4, 2, 16), np.float32)},
            TypeError,
            "k_cache must be a torch tensor, got ndarray",
        ),
        (
            {"v_cache": cache(4, 4, 2, 16).to_sparse()},
            TypeError,
            "v_cache must be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            {"k_cache": cache(4, 2, 16)},
            ValueError,
            "k_cache must be [num_kv_blocks, block_size, N, D], got [4, 2, 16]",
        ),
        (
            {"v_cache": cache(4, 4, 2, 8)},
            ValueError,
            "v_cache must be [4, 4, 2, 16], got [4, 4, 2, 8]",
        ),
        (
            {"v_cache": cache(4, 4, 2, 16, dtype=torch.float16)},
            TypeError,
            "v_cache must be float32 like k_cache, got float16",
        ),
        *(
            (
                caches(dtype=dtype),
                TypeError,
                f"k_cache must be float16, bfloat16 or float32, got {str(dtype)[6:]}",
            )
            for dtype in (torch.float64, torch.int8, torch.bool)
        ),
        (
            {"v_cache": cache(4, 4, 2, 16, device="meta")},
            ValueError,
            "v_cache must be on cpu like k_cache, got meta",
        ),
        (caches(device="meta"), ValueError, "k_cache must have memory, got device meta"),
        (
            {"k_cache": cache(4, 4, 0, 16)},
            ValueError,
            "k_cache must have N >= 1, got [4, 4, 0, 16]",
        ),
        (
            {"k_cache": cache(4, 0, 2, 16)},
            ValueError,
            "k_cache must have block_size >= 1, got [4, 0, 2, 16]",
        ),
        ({"k_cache": cache(4, 4, 2, 0)}, ValueError, "k_cache must have D >= 1, got [4, 4, 2, 0]"),
        (
            {"v_cache": cache(4, 4, 16, 2).transpose(2, 3)},
            ValueError,
            "v_cache must be contiguous in its last dimension, got strides [128, 32, 1, 2]",
        ),
        (
            {"num_heads": 3},
            ValueError,
            "num_heads must be a multiple of the 2 KV heads of k_cache, got 3",
        ),
        *(
            (
                {name: least - 1},
                ValueError,
                f"{name} must be at least {least}, got {least - 1}",
            )
            for name, least in (
                ("num_heads", 1),
                ("k", 1),
                ("max_batch", 1),
                ("max_blocks", 1),
                ("recent_blocks", 0),
                ("dense_below", 0),
            )
        ),
        *(
            ({name: value}, TypeError, f"{name} must be an integer, got {type(value).__name__}")
            for name, value in (
                ("num_heads", 4.0),
                ("k", "2"),
                ("max_batch", None),
                ("max_blocks", 4.0),
                ("recent_blocks", None),
                ("dense_below", 1e9),
            )
        ),
        ({"k": 2**63}, ValueError, f"k must be a 64-bit integer, got {2**63}"),
        ({"scale": True}, TypeError, "scale must be a number, got bool"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
        ({"scale": 1e39}, ValueError, "scale must be finite in float32, got 1e+39"),
        ({"scale": -3e38}, ValueError, "scale must be finite in float32, got -3e+38"),
        ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
        ({"scale": 10**400}, ValueError, f"scale must be a 64-bit float, got {10**400}"),
    ],
)
def test_wrong_constructions(wrong: dict[str, object], kind: type[Exception], message: str) -> None:
    right = {**caches(), "num_heads": 4, "k": 2, "max_batch": 2, "max_blocks": 4}
    with fails(kind, message):
        QuestDecoder(**(right | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1, np.float32(1), np.int64(1), 2e38])
def test_numbers_of_other_types(scale: Any) -> None:
    decoder = QuestDecoder(
        **caches(), num_heads=np.int64(4), k=np.int32(2), max_batch=2, max_blocks=4, scale=scale
    )
    assert (decoder.num_heads, decoder.k, decoder.scale) == (4, 2, float(scale))


METHODS = {
    "prefill": (),
    "update": ("computed_lens",),
    "select": ("query",),
    "attend": ("query", "selected", "out", "lse"),
    "step": ("query", "computed_lens", "max_seq_len", "out", "lse"),
}


def with_metadata_to_write() -> tuple[Engine, QuestDecoder, dict[str, Any]]:
    """A decoder that has not seen a block that filled, and arguments of its methods."""
    engine, decoder = loaded(dense_below=40)
    engine.append(0, 2)
    arguments = {
        "query": torch.randn(3, NUM_HEADS, HEAD_DIM),
        "block_tables": engine.tables(),
        "seq_lens": engine.seq_lens(),
        "computed_lens": torch.tensor([36, 0, 0]).int(),
        "selected": torch.zeros(3, NUM_KV_HEADS, 3).int(),
        "out": torch.zeros(3, NUM_HEADS, HEAD_DIM),
        "lse": torch.zeros(3, NUM_HEADS),
        "max_seq_len": 40,
    }
    return engine, decoder, arguments


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: wrong}, TypeError, f"{name} must be {what}, got {type(wrong).__name__}")
        for name in ("query", "block_tables", "seq_lens", "computed_lens", "selected", "out", "lse")
        for wrong, what in ((7, "a tensor"), ([1], "a tensor"), (np.zeros(3), "a torch tensor"))
    ),
    *(
        ({name: None}, TypeError, f"{name} must be a tensor, got NoneType")
        for name in ("query", "block_tables", "seq_lens", "selected")
    ),
    *(
        ({name: torch.zeros(2, 2, 2, 2)}, ValueError, f"{name} must be {dims}, got [2, 2, 2, 2]")
        for name, dims in {
            "query": "[B, H, D]",
            "block_tables": "[B, MKBPR]",
            "seq_lens": "[B]",
            "computed_lens": "[B]",
            "selected": "[B, N, k]",
            "out": "[B, H, D]",
            "lse": "[B, H]",
        }.items()
    ),
    ({"seq_lens": torch.ones(3).long()}, TypeError, "seq_lens must be int32, got int64"),
    ({"computed_lens": torch.ones(3)}, TypeError, "computed_lens must be int32, got float32"),
    ({"block_tables": torch.ones(3, 9)}, TypeError, "block_tables must be int32, got float32"),
    ({"selected": torch.zeros(3, 2, 1).long()}, TypeError, "selected must be int32, got int64"),
    (
        {"query": torch.zeros(3, NUM_HEADS, HEAD_DIM).half()},
        TypeError,
        "query must be float32 like k_cache, got float16",
    ),
    (
        {"out": torch.zeros(3, NUM_HEADS, HEAD_DIM).bfloat16()},
        TypeError,
        "out must be float32 like k_cache, got bfloat16",
    ),
    ({"lse": torch.zeros(3, NUM_HEADS).double()}, TypeError, "lse must be float32, got float64"),
    *(
        (
            {name: torch.zeros(shape, dtype=dtype, device="meta")},
            ValueError,
            f"{name} must be on cpu like k_cache, got meta",
        )
        for name, shape, dtype in (
            ("query", (3, NUM_HEADS, HEAD_DIM), torch.float32),
            ("block_tables", (3, 12), torch.int32),
            ("seq_lens", (3,), torch.int32),
            ("lse", (3, NUM_HEADS), torch.float32),
        )
    ),
    (
        {"block_tables": torch.zeros(3, 13).int()},
        ValueError,
        "block_tables must be [8, 12] at most, got [3, 13]",
    ),
    (
        {
            "block_tables": torch.zeros(9, 12).int(),
            "seq_lens": torch.zeros(9).int(),
            "query": torch.zeros(9, NUM_HEADS, HEAD_DIM),
        },
        ValueError,
        "block_tables must be [8, 12] at most, got [9, 12]",
    ),
    ({"seq_lens": int32(1, 1)}, ValueError, "seq_lens must be [3], got [2]"),
    ({"computed_lens": int32(1)}, ValueError, "computed_lens must be [3], got [1]"),
    ({"query": torch.zeros(2, 6, 16)}, ValueError, "query must be [3, 6, 16], got [2, 6, 16]"),
    ({"query": torch.zeros(3, 4, 16)}, ValueError, "query must be [3, 6, 16], got [3, 4, 16]"),
    ({"query": torch.zeros(3, 6, 8)}, ValueError, "query must be [3, 6, 16], got [3, 6, 8]"),
    ({"out": torch.zeros(3, 6, 8)}, ValueError, "out must be [3, 6, 16], got [3, 6, 8]"),
    ({"lse": torch.zeros(6, 3)}, ValueError, "lse must be [3, 6], got [6, 3]"),
    (
        {"selected": torch.zeros(3, 6, 2).int()},
        ValueError,
        "selected must be [3, 2, *], got [3, 6, 2]",
    ),
    (
        {"query": torch.zeros(3, 16, 6).mT},
        ValueError,
        "query must be contiguous in its last dimension, got strides [96, 1, 6]",
    ),
    (
        {"lse": torch.zeros(6, 3).T},
        ValueError,
        "lse must be contiguous in its last dimension, got strides [1, 3]",
    ),
    (
        {"out": torch.zeros(1, 6, 16).expand(3, -1, -1)},
        ValueError,
        "out is written and must not overlap itself, got shape [3, 6, 16] with strides [0, 16, 1]",
    ),
    (
        {"lse": torch.zeros(8).as_strided((3, 6), (1, 1))},
        ValueError,
        "lse is written and must not overlap itself, got shape [3, 6] with strides [1, 1]",
    ),
    (
        {"out": torch.zeros(3, 6, 16, requires_grad=True)},
        ValueError,
        "out is written and must not require grad",
    ),
    (
        {"seq_lens": int32(1, -1, 0)},
        ValueError,
        "seq_lens[1] must be in [0, 48], what block_tables holds, got -1",
    ),
    (
        {"seq_lens": int32(1, 0, 49)},
        ValueError,
        "seq_lens[2] must be in [0, 48], what block_tables holds, got 49",
    ),
    (
        {"computed_lens": int32(0, 9, 0)},
        ValueError,
        "computed_lens[1] must be in [0, 6], the request's length, got 9",
    ),
    (
        {"computed_lens": int32(0, 0, -1)},
        ValueError,
        "computed_lens[2] must be in [0, 21], the request's length, got -1",
    ),
    ({"max_seq_len": 39}, ValueError, "seq_lens[0] must be at most 39, max_seq_len, got 40"),
    ({"max_seq_len": -1}, ValueError, "max_seq_len must be at least 0, got -1"),
    ({"max_seq_len": 40.0}, TypeError, "max_seq_len must be an integer, got float"),
]


@pytest.mark.parametrize(
    ("method", "wrong", "kind", "message"),
    [
        (method, *line)
        for method, own in METHODS.items()
        for line in WRONG_CALLS
        if next(iter(line[0])) in ("block_tables", "seq_lens", *own)
    ],
)
def test_wrong_calls(
    method: str, wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Each is found before anything is written, the metadata included."""
    _, decoder, arguments = with_metadata_to_write()
    names = ("block_tables", "seq_lens", *METHODS[method])
    arguments = {name: (arguments | wrong)[name] for name in names}
    before = [state.clone() for state in (decoder.maxblocks, decoder.minblocks)]
    with fails(kind, message):
        getattr(decoder, method)(**arguments)
    for name, state in zip(("maxblocks", "minblocks"), before, strict=True):
        torch.testing.assert_close(getattr(decoder, name), state, equal_nan=True, rtol=0, atol=0)
    for name in ("out", "lse"):
        assert name in wrong or not arguments.get(name, torch.zeros(1)).any()


@pytest.mark.parametrize("method", ["attend", "step"])
@pytest.mark.parametrize("other", ["query", "k_cache", "lse", "seq_lens"])
def test_outputs_that_share_memory(method: str, other: str) -> None:
    engine, decoder, arguments = with_metadata_to_write()
    arguments = {name: arguments[name] for name in ("block_tables", "seq_lens", *METHODS[method])}
    if other == "query":
        arguments["out"] = arguments["query"]
    elif other == "k_cache":
        arguments["out"] = engine.k_cache.view(-1)[100:388].view(3, NUM_HEADS, HEAD_DIM)
    elif other == "lse":
        arguments["lse"] = arguments["out"].view(-1)[5:23].view(3, NUM_HEADS)
    else:
        arguments["lse"] = torch.zeros(3, NUM_HEADS)
        arguments["seq_lens"] = (
            arguments["lse"].view(torch.int32).view(-1)[7:10].copy_(arguments["seq_lens"])
        )
    written, read = {
        "query": ("out", "query"),
        "k_cache": ("out", "k_cache"),
        "lse": ("out", "lse"),
        "seq_lens": ("lse", "seq_lens"),
    }[other]
    before = decoder.maxblocks.clone()
    message = (
        f"{written} is written and must not share memory with {read}, got overlapping addresses"
    )
    with fails(ValueError, message):
        getattr(decoder, method)(**arguments)
    torch.testing.assert_close(decoder.maxblocks, before, equal_nan=True, rtol=0, atol=0)


def test_a_result_as_the_next_query() -> None:
    engine, decoder = loaded()
    arguments = (engine.tables(), engine.seq_lens())
    out = decoder.step(torch.randn(3, NUM_HEADS, HEAD_DIM), *arguments)
    with fails(ValueError, "query must not lie in the decoder's own out: clone it"):
        decoder.step(out, *arguments)
    lse = out.view(-1)[: 3 * NUM_HEADS].view(3, NUM_HEADS)
    message = (
        "lse is written and must not share memory with the decoder's own out, "
        "got overlapping addresses"
    )
    with fails(ValueError, message):
        decoder.step(out.clone(), *arguments, lse=lse)
    kept = out.clone()
    expected = decoder.step(kept, *arguments).clone()
    out.copy_(kept)
    assert torch.equal(decoder.step(out, *arguments, out=torch.empty_like(out)), expected)


def test_a_table_entry_outside_the_cache() -> None:
    """A step that meets one only after the metadata's update can be made again."""
    engine, decoder = loaded()
    engine.append(0, 2)
    tables = engine.tables()
    tables[0, 1] = 64
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    computed_lens = torch.tensor([36, 0, 0]).int()
    with fails(ValueError, "metadata_block_tables[0, 1] must be in [0, 64), got 64"):
        decoder.step(query, tables, engine.seq_lens(), computed_lens=computed_lens)
    out = decoder.step(query, engine.tables(), engine.seq_lens(), computed_lens=computed_lens)
    torch.testing.assert_close(
        out.double(), expected_step(engine, query, 3, 1), rtol=1e-4, atol=1e-5
    )


def test_several_tokens_at_once_and_some_taken_back() -> None:
    """As in speculative decoding: a verified part of a draft stays."""
    torch.manual_seed(1)
    draw = random.Random(1)
    engine = Engine(3, num_kv_blocks=64, max_blocks=40)
    decoder = engine.decoder(4)
    for tokens in (10, 2):
        engine.admit(tokens)
    decoder.prefill(engine.tables(), engine.seq_lens())
    for _ in range(25):
        before = engine.seq_lens()
        for request in range(2):
            engine.append(request, draw.randint(1, 5))
        query = torch.randn(2, NUM_HEADS, HEAD_DIM)
        out = decoder.step(query, engine.tables(), engine.seq_lens(), computed_lens=before)
        torch.testing.assert_close(
            out.double(), expected_step(engine, query, 4, 1), rtol=1e-4, atol=1e-5
        )
        for request in range(2):
            engine.cut(request, draw.randint(int(before[request]) + 1, engine.lens[request]))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.randoms(use_true_random=False))
def test_drafts_as_rows_of_a_step(
    block_size: int, k: int, recent_blocks: int, draw: random.Random
) -> None:
    """Every drafted token is a request of its own, with the table of the request that drafts."""
    torch.manual_seed(0)
    engine = Engine(block_size, num_kv_blocks=128, max_blocks=64)
    decoder = engine.decoder(k, recent_blocks=recent_blocks)
    for tokens in (10, 3):
        engine.admit(tokens)
    decoder.prefill(engine.tables(), engine.seq_lens())
    for _ in range(10):
        drafted = draw.randint(1, 4)
        before = list(engine.lens)
        for request in range(2):
            engine.append(request, drafted)
        query = torch.randn(2, drafted, NUM_HEADS, HEAD_DIM)
        out = decoder.step(
            query.flatten(0, 1),
            engine.tables().repeat_interleave(drafted, 0),
            (torch.tensor(before)[:, None] + torch.arange(1, drafted + 1)).int().flatten(),
        ).view_as(query)
        for i in range(drafted):
            engine.lens = [length + i + 1 for length in before]
            expected = expected_step(engine, query[:, i], k, recent_blocks)
            torch.testing.assert_close(out[:, i].double(), expected, rtol=1e-4, atol=1e-5)
        for request in range(2):
            engine.cut(request, before[request] + draw.randint(1, drafted))


def test_computed_lens_beyond_the_accepted_length() -> None:
    """Why it is the accepted length: the metadata that a rejected draft left stays."""
    torch.manual_seed(0)
    engine = Engine(4)
    engine.admit(9)
    decoder = engine.decoder(2)
    decoder.prefill(engine.tables(), engine.seq_lens())
    engine.append(0, 4)  # drafted: block 2 is full
    decoder.update(engine.tables(), engine.seq_lens(), torch.tensor([9]).int())
    engine.cut(0, 10)
    engine.append(0, 4)
    for computed, is_right in ((13, False), (10, True)):
        decoder.update(engine.tables(), engine.seq_lens(), torch.tensor([computed]).int())
        block = engine.requests[0][2]
        maximum = engine.k_cache[block].amax(0)
        assert torch.equal(decoder.maxblocks[block, 0], maximum) is is_right

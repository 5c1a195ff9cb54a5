"""QuestDecoder: decode loops of an engine that shares, frees and hands on KV blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
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
    with pytest.raises(ValueError, match="a length exceeds max_seq_len, 37"):
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


def cache(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k_cache": cache(4, 2, 16)}, "k_cache must have 4 dimensions, got 3"),
        (
            {"v_cache": cache(4, 4, 2, 8)},
            r"v_cache must have shape torch.Size\(\[4, 4, 2, 16\]\) as k_cache",
        ),
        (
            {"v_cache": cache(4, 4, 2, 16, dtype=torch.float16)},
            "v_cache must have dtype torch.float32 as k_cache, got torch.float16",
        ),
        ({"num_heads": 3}, "num_heads must be a multiple of the 2 KV heads, got 3"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_blocks": 0}, "max_blocks must be at least 1, got 0"),
        ({"recent_blocks": -1}, "recent_blocks must be at least 0, got -1"),
        ({"dense_below": -1}, "dense_below must be at least 0, got -1"),
    ],
)
def test_wrong_arguments(wrong: dict[str, object], message: str) -> None:
    right = {
        "k_cache": cache(4, 4, 2, 16),
        "v_cache": cache(4, 4, 2, 16),
        "num_heads": 4,
        "k": 2,
        "max_batch": 2,
        "max_blocks": 4,
    }
    with pytest.raises(ValueError, match=message):
        QuestDecoder(**(right | wrong))  # type: ignore[arg-type]


def test_too_many_requests() -> None:
    engine, decoder = loaded()
    nine = torch.ones(9, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"seq_lens must be \[8\] at most, got \[9\]"):
        decoder.update(engine.tables(), nine)


@pytest.mark.parametrize("method", ["prefill", "update", "step"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"seq_lens": torch.ones(3)}, TypeError, "seq_lens must be int32, got torch.float32"),
        (
            {"seq_lens": torch.ones(3, 1).int()},
            ValueError,
            r"seq_lens must be \[8\] at most, got \[3, 1\]",
        ),
        (
            {"computed_lens": torch.ones(1).int()},
            ValueError,
            r"computed_lens must be \[3\], got \[1\]",
        ),
        (
            {"block_tables": torch.zeros(3, 13).int()},
            ValueError,
            r"block_tables must be \[\*, 12\] at most, got \[3, 13\]",
        ),
    ],
)
def test_wrong_calls(
    method: str, wrong: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    engine, decoder = loaded()
    arguments = {"block_tables": engine.tables(), "seq_lens": engine.seq_lens()} | wrong
    if method == "step":
        arguments["query"] = torch.randn(3, NUM_HEADS, HEAD_DIM)
    elif method == "prefill" and "computed_lens" in wrong:
        pytest.skip("prefill takes none")
    before = decoder.maxblocks.clone()
    with pytest.raises(error, match=message):
        getattr(decoder, method)(**arguments)
    torch.testing.assert_close(decoder.maxblocks, before, equal_nan=True, rtol=0, atol=0)


def test_a_wrong_max_seq_len_writes_nothing() -> None:
    engine, decoder = loaded(dense_below=40)
    engine.append(0, 2)  # fills a block
    before = decoder.maxblocks.clone()
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="a length exceeds"):
        decoder.step(query, engine.tables(), engine.seq_lens(), max_seq_len=37)
    torch.testing.assert_close(decoder.maxblocks, before, equal_nan=True, rtol=0, atol=0)


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
            kept = draw.randint(int(before[request]) + 1, engine.lens[request])
            engine.lens[request] = kept
            blocks = engine.requests[request]
            while len(blocks) > -(-kept // 3):
                engine.free.append(blocks.pop())

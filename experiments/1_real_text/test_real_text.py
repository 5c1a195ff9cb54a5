"""The demo on a short text, end to end, and its parts against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import demo_real_text
import numpy as np
import pytest
import text_features
import torch
from demo_real_text import DemoResult
from gen_data_real_text import BLOCK_SIZE, HEAD_DIM, gen_data_real_text, step_positions
from select_attn_ops.recall import measures
from whole_step import relative_error

NUM_TOKENS = 12_288 + 77
NUM_STEPS = 24


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real_text") / "picture.png"


@pytest.fixture(scope="module")
def result(device: torch.device, picture: Path) -> DemoResult:
    return demo_real_text.main(
        [
            f"--tokens={NUM_TOKENS}",
            f"--positions={NUM_STEPS}",
            f"--device={device}",
            f"--output={picture}",
        ]
    )


def test_masses_are_ordered(result: DemoResult) -> None:
    for budget in result.budgets:
        for held in (budget.selected, budget.recent, budget.random):
            assert held.shape == (NUM_STEPS, 8)
            assert (held >= 0).all()
            assert (held <= budget.best + 1e-6).all()
        assert (budget.best <= 1 + 1e-5).all()


def test_more_blocks_hold_more(result: DemoResult) -> None:
    for fewer, more in zip(result.budgets, result.budgets[1:], strict=False):
        assert torch.equal(more.blocks[..., : fewer.k], fewer.blocks)
        for field in ("selected", "best", "recent"):
            assert (getattr(more, field) >= getattr(fewer, field) - 1e-6).all()


def test_selection_is_far_better_than_chance(result: DemoResult) -> None:
    budget = result.budgets[1]
    assert budget.k == 16
    assert budget.selected.mean() > budget.random.mean() + 0.2
    assert budget.selected.mean() > 0.7 * budget.best.mean()


def test_window_and_sink_are_selected(result: DemoResult) -> None:
    seq_lens = result.data.seq_lens.cpu()
    partial = seq_lens % BLOCK_SIZE != 0
    blocks = result.budgets[0].blocks.cpu()
    newest = (seq_lens - 1) // BLOCK_SIZE
    assert partial.any()
    assert (blocks[partial, :, 0] == newest[partial, None]).all()
    assert (blocks == 0).any(-1).all()
    assert (blocks <= newest[:, None, None]).all()


def test_cost_counts_what_is_read(result: DemoResult) -> None:
    last_len = int(result.data.seq_lens[-1])
    assert result.kv_bytes == last_len * 8 * HEAD_DIM * 2 * 2
    for budget in result.budgets:
        assert budget.step_bytes == (last_len // BLOCK_SIZE - 1) * 8 * HEAD_DIM * 2 * 2
        assert budget.step_bytes < budget.read_bytes
        assert budget.read_bytes <= budget.step_bytes + budget.k * BLOCK_SIZE * 8 * HEAD_DIM * 4
        assert budget.batch_seconds > 0
        assert budget.step_seconds > 0


def test_exact_mass_matches_plain_softmax(result: DemoResult) -> None:
    data = result.data
    table = data.block_tables[0].long()
    for step in (0, NUM_STEPS - 1):
        seq_len = int(data.seq_lens[step])
        assert result.mass[step, :, -(-seq_len // BLOCK_SIZE) :].eq(0).all()
        for head in (0, 7):
            keys = data.k_cache[table].flatten(0, 1)[:seq_len, head].double()
            query = data.query[step, head * 4 : head * 4 + 4].double()
            weights = (query @ keys.T / HEAD_DIM**0.5).softmax(-1)
            share = weights.mean(0)
            share = torch.nn.functional.pad(share, (0, -seq_len % BLOCK_SIZE))
            values = data.v_cache[table].flatten(0, 1)[:seq_len, head].double()
            expected = share.view(-1, BLOCK_SIZE).sum(-1)
            actual = result.mass[step, head, : len(expected)].double()
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
            out = result.exact_out[step, head * 4 : head * 4 + 4].double()
            torch.testing.assert_close(out, weights @ values, rtol=1e-4, atol=1e-5)


def test_error_falls_with_the_budget(result: DemoResult) -> None:
    by_torch, dense, *sparse = result.steps
    assert [step.k for step in sparse] == [budget.k for budget in result.budgets]
    # Of bfloat16 alone.
    assert 0 < by_torch.error < 0.005
    assert 0 < dense.error < 0.005
    errors = [step.error for step in sparse]
    assert errors == sorted(errors, reverse=True)
    assert dense.error < errors[-1] < errors[0] < 0.1
    assert all(step.seconds > 0 for step in result.steps)


def test_relative_error_of_rows() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    out = torch.tensor([[3.0, 4.5], [1.0, 2.0]])
    assert relative_error(out, exact) == pytest.approx((0.1 + 0.5) / 2)


def test_table_and_picture(
    result: DemoResult, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_real_text.print_table(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for budget in result.budgets:
        assert sum(line.startswith(f"{budget.k:6}") for line in lines) == 2
        assert sum(line.startswith(f"{budget.k} blocks") for line in lines) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_same_text_and_seed_same_cache() -> None:
    def cache(seed: int) -> torch.Tensor:
        data = gen_data_real_text(text_features.default_text(), 2048, 4, seed, torch.device("cpu"))
        caches = (data.k_cache.flatten(), data.v_cache.flatten())
        return torch.cat([*caches, data.query.flatten(), data.seq_lens.flatten()])

    first = cache(0)
    assert first.isfinite().all()
    assert torch.equal(first, cache(0))
    assert not torch.equal(first, cache(1))


def test_keys_do_not_see_later_tokens() -> None:
    vectors = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    changed = vectors.copy()
    changed[40:] *= -1
    head = text_features.qwen3_8b_heads()[0]
    rotation = text_features.random_rotation(16, np.random.default_rng(1))
    keys, other = (text_features.head_keys(v, head, rotation) for v in (vectors, changed))
    np.testing.assert_array_equal(keys[:40], other[:40])
    assert (keys[40:] != other[40:]).any(-1).all()
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 4, rtol=1e-5)


def test_positions_spread_over_the_second_half() -> None:
    positions = step_positions(10_000, 50, np.random.default_rng(0))
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal((positions - 5000) // 100, np.arange(50))


def test_random_blocks_exist_and_differ() -> None:
    num_blocks = torch.tensor([3, 40])
    drawn = measures.random_blocks(num_blocks, 2, 8, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 2, 8)
    for row, count in zip(drawn.flatten(0, 1).tolist(), (3, 3, 8, 8), strict=True):
        listed = [block for block in row if block >= 0]
        assert len(set(listed)) == len(listed) == count
    assert (drawn < num_blocks[:, None, None]).all()


def test_tokens_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("if x1 == 10:\n    return 知识\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.bin").write_bytes(b"plain\0but binary")
    (tmp_path / ".hidden").write_text("not read")
    expected = ["if", "x1", "=", "=", "10", ":", "\n    ", "return", "知", "识", "\n"]
    assert text_features.read_tokens(tmp_path, 11, seed=0) == expected


def test_frequent_types_come_first_and_rare_ones_are_hashed() -> None:
    tokens = [f"t{i}" for i in range(5000)] + ["often"] * 2
    ids = text_features.token_ids(tokens)
    assert ids[-1] == ids[-2] == 0
    assert ids.max() >= 4096
    assert len(np.unique(ids)) > 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("only five tokens in here\n", "has 6 tokens, 2,048 are needed"),
        ("a b c " * 1000, "has only 3 different tokens, more than 128 are needed"),
    ],
)
def test_short_text_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    with pytest.raises(SystemExit, match=message):
        demo_real_text.main(["--text", str(file), "--tokens", "2048", "--positions", "4"])


def test_missing_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No such file"):
        demo_real_text.main(["--text", str(tmp_path / "absent"), "--tokens", "2048"])

"""What the benchmark compares is the same model over the same context."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_generate import Result, Way, compare, fill, make_model, table
from select_attn_ops.integrations.transformers import QuestCache, register
from transformers import DynamicCache

SCRIPT = Path(__file__).parent / "benchmark_generate.py"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    register()
    return make_model(1, torch.device("cpu"), torch.float32)


def test_caches_hold_the_same(model: torch.nn.Module) -> None:
    """With a budget above the length, the next token's logits are the dense ones."""
    context = torch.randint(1, 1024, (1, 200), generator=torch.Generator().manual_seed(0))
    logits = []
    for attention, cache in (
        ("sdpa", DynamicCache(config=model.config)),
        ("quest", QuestCache(model.config, budget=1024, dense_layers=0)),
    ):
        fill(model, Way(attention, attention, cache), context)
        assert cache.get_seq_length() == 199
        with torch.no_grad():
            logits.append(model(context[:, -1:], cache=cache).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_every_round_goes_on(model: torch.nn.Module) -> None:
    results = compare(model, 100, 64, rounds=2, new_tokens=3)
    assert [result.tokens for result in results] == [100] * 3
    assert all(result.per_second > 0 for result in results)


def test_the_table_compares_with_the_best_dense_way() -> None:
    results = [Result("dense, a", 8, 2.0), Result("dense, b", 8, 4.0), Result("sparse", 8, 12.0)]
    assert table(results).splitlines()[2:] == [
        "| 8 | dense, a | 2.0 | 0.50 |",
        "| 8 | dense, b | 4.0 | 1.00 |",
        "| 8 | sparse | 12.0 | 3.00 |",
    ]


def test_smoke() -> None:
    command = [sys.executable, str(SCRIPT), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| 1024 | sparse, budget 256 |" in done.stdout

"""merge_attention_states against attention over the whole, and where there is none."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from select_attn_ops import merge_attention_states, paged_select_attention

INF, NAN = float("inf"), float("nan")


def parts(*shape: int, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(count, *shape, generator=generator)
    return list(outs), list(10 * torch.randn(count, *shape[:-1], generator=generator))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_is_attention_over_the_whole(tokens: list[int], heads: int) -> None:
    generator = torch.Generator().manual_seed(sum(tokens))
    logits = [3 * torch.randn(heads, n, generator=generator) for n in tokens]
    values = [torch.randn(heads, n, 8, generator=generator) for n in tokens]
    outs = [x.softmax(-1)[:, None].bmm(v)[:, 0] for x, v in zip(logits, values, strict=True)]
    for out, n in zip(outs, tokens, strict=True):
        if n == 0:
            out.fill_(NAN)  # does not matter
    out, lse = merge_attention_states(outs, [x.logsumexp(-1) for x in logits])
    all_logits, all_values = torch.cat(logits, -1).double(), torch.cat(values, 1).double()
    expected = all_logits.softmax(-1)[:, None].bmm(all_values)[:, 0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), all_logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(dtype: torch.dtype) -> None:
    outs, lses = parts(2, 3, 8, count=3)
    out, lse = merge_attention_states([out.to(dtype) for out in outs], lses)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


def test_any_iterable() -> None:
    outs, lses = parts(2, 3, 8, count=3)
    expected = merge_attention_states(outs, lses)
    for made in (tuple, iter, lambda of: (each for each in of), lambda of: map(torch.clone, of)):
        for got, of in zip(merge_attention_states(made(outs), made(lses)), expected, strict=True):
            assert torch.equal(got, of)


@pytest.mark.parametrize("of", ["outs", "lses", "both"])
def test_is_not_differentiable(of: str) -> None:
    outs, lses = parts(2, 3, 8, count=2)
    expected = merge_attention_states(outs, lses)
    if of != "lses":
        outs = [out.requires_grad_() * 1 for out in outs]
    if of != "outs":
        lses = [lse.requires_grad_() for lse in lses]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_attention_states(outs, lses)
    for got, want in zip(merged, expected, strict=True):
        assert not got.requires_grad
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize("infinite", [INF, NAN])
def test_an_infinite_logit(kind: Any, infinite: float) -> None:
    def made(*values: Any) -> Any:
        return kind(values, dtype=torch.float32 if kind is torch.tensor else np.float32)

    with np.errstate(invalid="ignore"):
        out, lse = merge_attention_states(
            [made([1.0], [1.0]), made([2.0], [2.0])], [made(0.0, infinite), made(0.0, 1.0)]
        )
    np.testing.assert_allclose(np.asarray(out), [[1.5], [NAN]])
    np.testing.assert_allclose(np.asarray(lse), [np.log(2), NAN], rtol=1e-6)


def test_logits_that_are_all_minus_infinity() -> None:
    """They leave the lse of no tokens, and count as none."""
    query = torch.full((1, 1, 8), INF)
    keys, values = -torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 8)
    table, lens, lse = torch.tensor([[0, 1]]).int(), torch.tensor([2]).int(), torch.empty(1, 1)
    states = []
    for block in (0, 1):
        selected = torch.tensor([[[block]]]).int()
        out = paged_select_attention(query, keys, values, table, lens, selected, lse=lse)
        assert bool(out.isnan().all())
        states.append((out, lse.clone()))
    out, merged = merge_attention_states(*zip(*states, strict=True))
    assert not out.any()
    assert bool((merged == -INF).all())
    others = (torch.full_like(out, 3.0), torch.zeros_like(lse))
    out, merged = merge_attention_states(*zip(*states, others, strict=True))
    assert bool((out == 3).all())
    assert not merged.any()

"""paged_select_attention against its reference; as a script, a smoke test."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from common.compare import assert_attention_matches, assert_written
from common.devices import device_or_exit, script_parser
from common.layouts import CACHE_LAYOUTS, clone_with_storage, strided_full
from common.paged import make_seq_lens
from common.sweeps import DTYPES, Grid, parametrize
from gen_data_paged_select_attention import AttentionInputs, gen_data_paged_select_attention
from ref_paged_select_attention import paged_select_attention_ref, selected_tokens
from select_attn_ops import merge_attention_states, paged_select_attention
from torch.nn.functional import scaled_dot_product_attention


def attend(
    inputs: AttentionInputs, layout: str | None = "contiguous"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the operator and return its results.

    Parameters
    ----------
    inputs : AttentionInputs
        Arguments; their storage must not change.
    layout : str or None
        Layout of given results, around which nothing may be written; None for a new ``out``.
    """
    shape, dtype, device = inputs.query.shape, inputs.query.dtype, inputs.query.device
    lse = strided_full(shape[:2], torch.float32, layout or "contiguous", device=device)
    results = {"lse": lse}
    if layout is not None:
        results["out"] = strided_full(shape, dtype, layout, device=device)
    before = {name: clone_with_storage(view) for name, view in results.items()}
    with inputs.unchanged():
        out = paged_select_attention(*inputs.positional, **inputs.keywords, **results)
    assert out is results.get("out", out), "out must be what is returned"
    assert (out.shape, out.dtype) == (shape, dtype)
    for name, view in results.items():
        assert_written(name, view, before[name], view)
    return out, lse


def check(inputs: AttentionInputs, *, layout: str | None = "contiguous") -> None:
    """Run the operator, then the reference, and compare."""
    out, lse = attend(inputs, layout)
    on_cpu = inputs.map(torch.Tensor.cpu)
    reference = paged_select_attention_ref(*on_cpu.positional, **on_cpu.keywords)
    assert_attention_matches(out, lse, reference)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two results are the same bytes."""
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def smoke(device: torch.device) -> str:
    """Check one call; return what was checked."""
    seq_lens, k = [128 * 40, 128 * 20 + 5, 0], 16
    inputs = gen_data_paged_select_attention(
        seq_lens, k, num_heads=32, num_kv_heads=8, head_dim=128, block_size=128, device=device
    )
    check(inputs)
    return (
        f"paged_select_attention on {device}: bfloat16, {len(seq_lens)} requests of {seq_lens} "
        f"tokens, 32 heads, 8 KV heads, {k} blocks of 128 each: out and lse are the reference's, "
        "NaN in all other blocks does not show, nothing else was written"
    )


def test_smoke(device: torch.device) -> None:
    smoke(device)


@parametrize(
    Grid(
        {
            "dtype": DTYPES,
            "layout": CACHE_LAYOUTS,
            "selection": ("distinct", "scattered", "repeated"),
            "values": ("normal", "large", "special"),
        }
    ).all()
)
def test_basic(case: dict, device: torch.device) -> None:
    seq_lens = make_seq_lens("ragged", 5, 16 * 30, 16)
    inputs = gen_data_paged_select_attention(seq_lens, 12, device=device, **case)
    check(inputs, layout=case["layout"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basic_new_result(dtype: torch.dtype, device: torch.device) -> None:
    inputs = gen_data_paged_select_attention([700, 3, 0, 256], 7, dtype=dtype, device=device)
    check(inputs, layout=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_basic_numpy(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("NumPy arrays live on the CPU")
    inputs = gen_data_paged_select_attention([700, 16, 0], 9, dtype=dtype)
    actual = paged_select_attention(*(tensor.numpy() for tensor in inputs.positional))
    assert type(actual).__module__ == "numpy"
    reference = paged_select_attention_ref(*inputs.positional)
    assert_attention_matches(torch.from_numpy(actual), None, reference)


EDGES: dict[str, dict[str, Any]] = {
    "empty_batch": {"seq_lens": []},
    "nothing_to_select": {"seq_lens": [0, 0]},
    "empty_tables": {"seq_lens": [0, 0], "spare_columns": 0},
    "one_token": {"seq_lens": [1]},
    "around_a_block": {"seq_lens": [15, 16, 17, 31, 32, 33]},
    "around_a_chunk": {"seq_lens": [1023, 1024, 1025, 2047, 2049], "k": 200},
    "k_1": {"seq_lens": [700, 16], "k": 1},
    "k_beyond_all": {"seq_lens": [700, 1, 0], "k": 300},
    "block_size_1": {"seq_lens": [70, 1], "block_size": 1},
    "many_blocks_of_1": {"seq_lens": [3000], "block_size": 1, "k": 2500},
    "odd_block_size": {"seq_lens": [700, 13, 14], "block_size": 13},
    "blocks_longer_than_a_chunk": {"seq_lens": [7000, 2049, 1, 3071], "block_size": 3000, "k": 3},
    "more_tokens_than_a_request": {"seq_lens": [100], "block_size": 5000},
    "one_head": {"seq_lens": [700], "num_heads": 1, "num_kv_heads": 1},
    "no_groups": {"seq_lens": [700], "num_heads": 8, "num_kv_heads": 8},
    **{
        f"groups_of_{group}": {"seq_lens": [200, 33], "num_heads": 2 * group}
        for group in (2, 3, 5, 6, 7, 8, 9, 16, 71)
    },
    "many_kv_heads": {"seq_lens": [300], "num_heads": 64, "num_kv_heads": 32},
    **{
        f"head_dim_{d}": {"seq_lens": [300, 7], "head_dim": d}
        for d in (1, 2, 7, 8, 15, 16, 31, 33, 65, 80, 96, 100, 128, 129, 192, 256, 300)
    },
    "scale_0": {"seq_lens": [300], "scale": 0.0},
    "scale_negative": {"seq_lens": [300], "scale": -0.7},
    "scale_large": {"seq_lens": [300], "scale": 30.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", ["distinct", "scattered", "repeated"])
@pytest.mark.parametrize("edge", EDGES)
def test_edge(edge: str, selection: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = {"k": 9, **EDGES[edge], "selection": selection, "dtype": dtype}
    check(gen_data_paged_select_attention(device=device, **arguments))


def dense_of(inputs: AttentionInputs, dtype: torch.dtype) -> torch.Tensor:
    """Return torch's attention over the selected tokens, in ``dtype``."""
    group = inputs.query.shape[1] // inputs.k_cache.shape[2]
    out = torch.zeros(inputs.query.shape, dtype=dtype)
    for b, heads in enumerate(inputs.selected_indices.tolist()):
        for n, selected in enumerate(heads):
            place = (inputs.block_tables[b], int(inputs.seq_lens[b]), selected, n)
            keys, values = (
                selected_tokens(cache, *place).to(dtype).expand(group, -1, -1)
                for cache in (inputs.k_cache, inputs.v_cache)
            )
            at = (b, slice(n * group, (n + 1) * group))
            query = inputs.query[at].to(dtype)[:, None]
            out[at] = scaled_dot_product_attention(query, keys, values)[:, 0]
    return out


ACCURACY = {
    "short": {"seq_lens": [100, 37], "k": 7},
    "chunks": {"seq_lens": [9000, 5000], "k": 60, "block_size": 128},
    "large": {"seq_lens": [3000], "k": 20, "block_size": 128, "values": "large"},
    "head_dim_64": {"seq_lens": [9000], "k": 70, "block_size": 64, "head_dim": 64},
    "head_dim_80": {"seq_lens": [3000], "k": 70, "head_dim": 80},
    "head_dim_256": {"seq_lens": [5000], "k": 70, "block_size": 64, "head_dim": 256},
    "group_of_7": {"seq_lens": [3000], "k": 70, "num_heads": 14},
    "one_token": {"seq_lens": [1], "k": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """At most twice the error that torch has on the same tokens, both against float64."""
    arguments = {"head_dim": 128, **ACCURACY[name], "dtype": dtype}
    inputs = gen_data_paged_select_attention(device=device, **arguments)
    out, _ = attend(inputs)
    on_cpu = inputs.map(torch.Tensor.cpu)
    exact = paged_select_attention_ref(*on_cpu.positional).out
    error, torch_error = (
        (result.cpu().double() - exact).abs().max().item()
        for result in (out, dense_of(on_cpu, dtype))
    )
    assert error <= 2 * torch_error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_selected_is_dense_attention(dtype: torch.dtype, device: torch.device) -> None:
    """In the order of the request, in any order: as torch's attention over the whole request."""
    seq_len, block_size = 2000, 16
    inputs = gen_data_paged_select_attention(
        [seq_len], 125, block_size=block_size, dtype=dtype, device=device
    )
    dense = dense_of(inputs.map(torch.Tensor.cpu), torch.float64)
    eps = torch.finfo(dtype).eps
    for order in (torch.arange(125), torch.arange(125).flip(0), torch.randperm(125)):
        inputs.selected_indices[:] = order.int()
        out, _ = attend(inputs)
        torch.testing.assert_close(out.cpu().double(), dense, rtol=eps, atol=eps)


def test_edge_weights_by_hand(device: torch.device) -> None:
    """Logits of log 1, log 2 and log 5 over values of 8, 16 and 24: (8 + 32 + 120) / 8."""
    inputs = gen_data_paged_select_attention(
        [3],
        1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        block_size=3,
        dtype=torch.float32,
        scale=1.0,
        device=device,
    )
    place = int(inputs.block_tables[0, 0])
    inputs.query.fill_(1)
    inputs.k_cache[place, :, 0, 0] = torch.tensor([1.0, 2.0, 5.0], device=device).log()
    inputs.v_cache[place, :, 0, 0] = torch.tensor([8.0, 16.0, 24.0], device=device)
    out, lse = attend(inputs)
    assert out.item() == pytest.approx(20, rel=1e-6)
    assert lse.exp().item() == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("logit", [1e4, -1e4, 3e37, -3e37])
def test_edge_extreme_logits(logit: float, device: torch.device) -> None:
    """Equal logits, however large, are equal weights; one that is smaller by 200 is none."""
    inputs = gen_data_paged_select_attention(
        [64], 4, head_dim=8, dtype=torch.float32, scale=1.0, device=device
    )
    inputs.query.zero_()
    inputs.query[..., 0] = 1
    inputs.k_cache.nan_to_num_()[..., 0] = logit
    out, lse = attend(inputs)
    places = inputs.block_tables[0, :4].long()
    mean = inputs.v_cache[places].flatten(0, 1).double().mean(0).repeat_interleave(4, 0)
    torch.testing.assert_close(out[0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, logit + 4.158883), rtol=1e-6, atol=1e-6)

    first = (int(inputs.block_tables[0, 0]), 0)
    if abs(logit) < 1e5:
        inputs.k_cache[..., 0] -= 200
        inputs.k_cache[(*first, slice(None), 0)] = logit
        out, lse = attend(inputs)
        only = inputs.v_cache[first].repeat_interleave(4, 0)
        torch.testing.assert_close(out[0], only, rtol=0, atol=0)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("token", [0, 40, 63, 1023, 1500])
def test_edge_special_key(special: float, token: int, device: torch.device) -> None:
    """One key of one KV head makes its heads NaN, or vanishes; others are as they were."""
    inputs = gen_data_paged_select_attention(
        [1600], 100, num_heads=6, head_dim=40, dtype=torch.float32, device=device
    )
    inputs.query[:] = inputs.query.abs()
    before, before_lse = attend(inputs)
    place = (int(inputs.block_tables[0, token // 16]), token % 16)
    inputs.k_cache[(*place, 1, 7)] = special
    out, lse = attend(inputs)
    assert_same_bits(out[:, :3], before[:, :3])
    assert_same_bits(lse[:, :3], before_lse[:, :3])
    if special == -INF:
        reference = paged_select_attention_ref(*inputs.map(torch.Tensor.cpu).positional)
        assert reference.out.isfinite().all()
        assert_attention_matches(out, lse, reference)
    else:
        assert out[:, 3:].isnan().all()
        assert lse[:, 3:].isnan().all()


def test_edge_all_logits_minus_infinity(device: torch.device) -> None:
    """As 0 / 0 and log(0); where some token has a weight, those of none do not show."""
    inputs = gen_data_paged_select_attention([1600], 100, num_kv_heads=1, device=device)
    inputs.query[:] = inputs.query.abs()
    keys = inputs.k_cache.clone()
    inputs.k_cache[:] = -INF
    out, lse = attend(inputs)
    assert out.isnan().all()
    assert (lse == -INF).all()
    for slot in (0, 50, 99):
        place = int(inputs.block_tables[0, int(inputs.selected_indices[0, 0, slot])])
        inputs.k_cache[:] = -INF
        inputs.k_cache[place] = keys[place]
        check(inputs)
        assert attend(inputs)[0].isfinite().all()


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_edge_special_value(special: float, device: torch.device) -> None:
    """Shows in its channel of the heads that share it, and nowhere else."""
    inputs = gen_data_paged_select_attention([300], 19, num_heads=6, device=device)
    before, before_lse = attend(inputs)
    place = (int(inputs.block_tables[0, 3]), 5)
    inputs.v_cache[(*place, 1, 7)] = special
    out, lse = attend(inputs)
    assert_same_bits(lse, before_lse)
    changed = out[:, 3:, 7].clone()
    assert torch.equal(
        changed.nan_to_num(0, 1, -1), torch.full_like(changed, special).nan_to_num(0, 1, -1)
    )
    out[:, 3:, 7] = before[:, 3:, 7]
    assert_same_bits(out, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 33])
def test_edge_exact_results_are_rounded_to_nearest(
    head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Of one token its value, to the bit; of two alike their mean, ties to even."""
    inputs = gen_data_paged_select_attention(
        [1, 2], 1, head_dim=head_dim, num_kv_heads=1, dtype=dtype, device=device
    )
    inputs.query.zero_()
    limits = torch.finfo(dtype)
    edges = [0.0, -0.0, 1.0, limits.max / 2, limits.tiny, limits.smallest_normal / 8, 3.3]
    one, two = (int(inputs.block_tables[b, 0]) for b in range(2))
    inputs.v_cache[one, 0, 0, :7] = torch.tensor(edges).to(inputs.v_cache)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    pattern = torch.randint(0, 2**14, (2, head_dim), dtype=bits)
    pattern += int(torch.tensor(limits.tiny, dtype=dtype).view(bits))
    inputs.v_cache[two, :2, 0] = pattern.view(dtype).to(device)
    out, _ = attend(inputs)
    assert torch.equal(out[0], inputs.v_cache[one, 0].expand_as(out[0]))
    mean = pattern.view(dtype).double().mean(0).to(dtype).expand(out.shape[1], -1)
    assert torch.equal(out[1].cpu(), mean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edge_batch_does_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    """A request's result is the same bits, run again, alone, or with others."""
    inputs = gen_data_paged_select_attention(
        [16 * 300, 0, 700, 16 * 200 - 3], 150, dtype=dtype, device=device
    )
    together = attend(inputs)
    assert_same_bits(attend(inputs, None)[0], together[0])
    for b in range(len(together[0])):
        for actual, expected in zip(attend(inputs.requests(b, b + 1)), together, strict=True):
            assert_same_bits(actual, expected[b : b + 1])


def test_edge_padding_does_not_matter(device: torch.device) -> None:
    """More empty slots behind leave the bits as they are; so does any physical place."""
    inputs = gen_data_paged_select_attention([5000], 300, values="normal", device=device)
    narrow = attend(inputs)
    padding = torch.full_like(inputs.selected_indices, -1)
    wide = replace(inputs, selected_indices=torch.cat([inputs.selected_indices, padding], -1))
    moved = replace(
        inputs,
        k_cache=inputs.k_cache.flip(0),
        v_cache=inputs.v_cache.flip(0),
        block_tables=len(inputs.k_cache) - 1 - inputs.block_tables,
    )
    for other in (wide, moved):
        for actual, expected in zip(attend(other), narrow, strict=True):
            assert_same_bits(actual, expected)


def test_edge_shared_blocks(device: torch.device) -> None:
    """Requests that share a prefix share its blocks."""
    inputs = gen_data_paged_select_attention([700, 640], 40, device=device)
    inputs.k_cache.nan_to_num_(0, 0, 0).clamp_(-3, 3)
    inputs.v_cache.nan_to_num_(0, 0, 0).clamp_(-3, 3)
    inputs.block_tables[1, :30] = inputs.block_tables[0, :30].clone()
    check(inputs)


def test_edge_query_heads_share_in_order(device: torch.device) -> None:
    """Head ``h`` attends to the keys of KV head ``h // (H // N)``."""
    inputs = gen_data_paged_select_attention(
        [16], 1, num_heads=6, num_kv_heads=3, head_dim=4, device=device
    )
    inputs.v_cache[:] = torch.arange(3, device=device)[:, None].to(inputs.v_cache)
    out, _ = attend(inputs)
    assert out[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_merge_to_the_whole(dtype: torch.dtype, device: torch.device) -> None:
    """The selection in two parts, one of them empty for a request."""
    inputs = gen_data_paged_select_attention([900, 130, 0], 40, dtype=dtype, device=device)
    parts = [
        attend(replace(inputs, selected_indices=part))
        for part in inputs.selected_indices.split([10, 30], -1)
    ]
    out, lse = merge_attention_states(*zip(*parts, strict=True))
    whole, whole_lse = attend(inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, whole, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


AXES = {
    "dtype": DTYPES,
    "batch": (1, 3, 8),
    "heads": ((1, 1), (4, 1), (15, 5), (32, 8), (14, 2), (24, 4)),
    "head_dim": (64, 80, 128, 256),
    "block_size": (16, 64, 128),
    "k": (1, 4, 16),
    "lengths": ("equal", "ragged"),
    "values": ("normal", "large", "special"),
}
EXTENSIVE = Grid(AXES)


@pytest.mark.extensive(full=EXTENSIVE.all, sample=EXTENSIVE.sample(60))
def test_extensive(case: dict, device: torch.device) -> None:
    case = dict(case)
    heads, block_size = case.pop("heads"), case["block_size"]
    seq_lens = make_seq_lens(
        case.pop("lengths"), case.pop("batch"), 20 * block_size - 1, block_size
    )
    inputs = gen_data_paged_select_attention(
        seq_lens, num_heads=heads[0], num_kv_heads=heads[1], device=device, **case
    )
    check(inputs)


LARGE = Grid({"dtype": DTYPES, "batch": (1, 4), "k": (16, 64), "lengths": ("equal", "ragged")})


@pytest.mark.large(full=LARGE.all, sample=LARGE.sample(3))
def test_large(case: dict, device: torch.device) -> None:
    """Up to 32,768 tokens per request, 32 heads of 128 channels."""
    case = dict(case)
    seq_lens = make_seq_lens(case.pop("lengths"), case.pop("batch"), 128 * 256, 128)
    inputs = gen_data_paged_select_attention(
        seq_lens,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        block_size=128,
        values="tiled",
        device=device,
        **case,
    )
    check(inputs)


if __name__ == "__main__":
    print(smoke(device_or_exit(script_parser(__doc__).parse_args().device)))

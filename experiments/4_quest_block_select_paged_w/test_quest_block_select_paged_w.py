"""quest_block_select_paged_in_out_w, window and sink, against its reference; also a smoke test."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from common.compare import assert_indices_equal, assert_selection_matches
from common.devices import device_or_exit, script_parser
from common.layouts import CACHE_LAYOUTS
from common.sweeps import DTYPES, Grid, parametrize
from gen_data_quest_block_select_paged import gen_data_quest_block_select_paged
from gen_data_quest_block_select_paged_w import gen_data_quest_block_select_paged_w
from ref_quest_block_select_paged_w import quest_block_select_paged_w_ref
from test_quest_block_select_paged import AXES, SWEEP_HEAD_DIM, check, fits, reference_of, select


def smoke(device: torch.device) -> str:
    """Check a window at the original's shape; return what was checked."""
    tokens, k = 128 + 31, 16
    inputs = gen_data_quest_block_select_paged_w(
        batch=2,
        tokens_since_metadata_update=tokens,
        longest=128 * 128 * 2,
        rows=128,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        device=device,
    )
    selected = select(inputs, k, "in_out_w")
    on_cpu = inputs.map(torch.Tensor.cpu)
    reference = quest_block_select_paged_w_ref(*on_cpu.positional, tokens, k)
    assert_selection_matches(selected, reference)
    return (
        f"quest_block_select_paged_in_out_w on {device}: bfloat16, 2 requests of "
        f"{inputs.seq_lens.tolist()} tokens, {tokens} since the update, k {k}: first the window "
        f"and the sink {reference.forced}, whose poisoned metadata was not read, then the "
        "blocks that reach the reference's scores"
    )


def test_smoke(device: torch.device) -> None:
    smoke(device)


@parametrize(
    Grid(
        {
            "dtype": DTYPES,
            "layout": CACHE_LAYOUTS,
            "update": ("aligned", "unaligned"),
            "window": ("scalar", "per_request"),
            "values": ("normal", "exact"),
        }
    ).all()
)
def test_basic(case: dict, device: torch.device) -> None:
    inputs = gen_data_quest_block_select_paged_w(
        batch=5, tokens_since_metadata_update=37, longest=16 * 50, device=device, **case
    )
    interface = "in_out_w" if case["window"] == "scalar" else "out"
    exact = case["values"] == "exact"
    check(inputs, 12, interface=interface, layout=case["layout"], exact=exact)


EDGES = {
    "no_request": ([], 3, 8),
    "no_token": ([0, 0], 3, 8),
    # Nothing decoded: whole blocks have no window, a partial one is it.
    "just_updated": ([160, 165, 16, 1], 0, 8),
    "first_token_of_a_block": ([161], 1, 8),
    "update_on_a_boundary": ([160 + 5, 160 + 5], 5, 8),
    "update_one_before_a_boundary": ([159 + 5], 5, 8),
    "update_one_behind_a_boundary": ([161 + 5], 5, 8),
    "window_of_whole_blocks": ([160 + 48], 48, 8),
    "window_of_most": ([320], 300, 8),
    "window_is_all": ([100, 160], 160, 8),
    "window_longer_than_the_request": ([100, 7, 0], 1000, 8),
    "window_much_longer": ([100, 7, 0], 2**31 - 1, 8),
    "window_up_to_block_1": ([320], 304, 8),
    "window_into_block_0": ([320], 305, 32),
    "k_is_the_window": ([320], 64, 4),
    "k_is_window_and_sink": ([320], 64, 5),
    "k_is_one_scored_block_more": ([320], 64, 6),
    "k_less_than_the_window": ([320], 64, 3),
    "k_1": ([320, 16], 64, 1),
    "k_1_without_a_window": ([320], 0, 1),
    "k_2_without_a_window": ([320], 0, 2),
    "k_beyond_all": ([320, 1], 64, 50),
    "short_and_long": ([16 * 400, 3], 20, 16),
    "disabled": ([320, 7], -1, 8),
}


@pytest.mark.parametrize("interface", ["out", "in_out_w"])
@pytest.mark.parametrize("values", ["normal", "exact", "ties", "special"])
@pytest.mark.parametrize("edge", EDGES)
def test_edge(edge: str, values: str, interface: str, device: torch.device) -> None:
    seq_lens, tokens, k = EDGES[edge]
    inputs = gen_data_quest_block_select_paged(
        seq_lens, tokens_since_metadata_update=tokens, values=values, device=device
    )
    check(inputs, k, interface=interface, exact=values in ("exact", "ties"))


PER_REQUEST_EDGES = {
    "all_known": ([320, 325, 0], [320, 325, 0]),
    "nothing_known": ([320, 7, 0], [0, 0, 0]),
    "all_different": ([320, 320, 320, 320, 320], [320, 319, 304, 303, 16]),
    "first_block_known": ([320, 320], [16, 15]),
    "equal_to_the_scalar": ([165, 165], [160, 160]),
}


@pytest.mark.parametrize("k", [1, 3, 8, 40])
@pytest.mark.parametrize("rows", [16, 4, 1])
@pytest.mark.parametrize("values", ["normal", "exact", "special"])
@pytest.mark.parametrize("edge", PER_REQUEST_EDGES)
def test_edge_per_request(edge: str, values: str, rows: int, k: int, device: torch.device) -> None:
    seq_lens, known = PER_REQUEST_EDGES[edge]
    inputs = gen_data_quest_block_select_paged(
        seq_lens,
        metadata_seq_lens=known,
        rows=rows,
        block_size=16,
        values=values,
        device=device,
    )
    check(inputs, k, exact=values == "exact")


@pytest.mark.parametrize(
    ("seq_lens", "known", "columns"),
    [
        ([16 * 5 + 1], [16 * 4], 1),
        ([16 * 30], [16 * 4], 1),
        ([16 * 30], [0], 0),
        ([16 * 30], [16], 0),
        ([16 * 30, 16 * 3], [16 * 9 + 3, 16 * 3], 3),
    ],
    ids=str,
)
def test_edge_window_beyond_the_table(
    seq_lens: list[int], known: list[int], columns: int, device: torch.device
) -> None:
    """Blocks that are not scored need no metadata row, so the table may end before them."""
    inputs = gen_data_quest_block_select_paged(
        seq_lens,
        metadata_seq_lens=known,
        rows=4,
        block_size=16,
        columns=columns,
        device=device,
    )
    for k in (2, 12, 40):
        check(inputs, k)


ORDERS = {
    # 20 blocks of 16 tokens, 40 of them new: blocks 17 to 19, then the sink.
    "window_then_sink": ([320], 40, 6, [19, 18, 17, 0]),
    "aligned_update_has_the_newest_block": ([16 * 10 + 1], 1, 3, [10, 0]),
    "whole_blocks_and_no_token_since": ([160], 0, 3, [0]),
    "partial_block_and_no_token_since": ([165], 0, 3, [10, 0]),
    "small_k_keeps_the_newest": ([320], 300, 2, [19, 18]),
    "sink_within_the_window_is_listed_once": ([40], 40, 5, [2, 1, 0, -1, -1]),
    "one_block": ([5], 2, 3, [0, -1, -1]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_edge_order(name: str, device: torch.device) -> None:
    """Windows worked out by hand, for the operator and for the reference."""
    seq_lens, tokens, k, prefix = ORDERS[name]
    inputs = gen_data_quest_block_select_paged(
        seq_lens, tokens_since_metadata_update=tokens, device=device
    )
    for indices in (select(inputs, k, "in_out_w"), reference_of(inputs, k).indices):
        for row in indices.flatten(0, 1).tolist():
            assert row[: len(prefix)] == prefix
            assert all(0 < j < 20 for j in row[len(prefix) :])


def test_edge_scalar_and_per_request_agree(device: torch.device) -> None:
    inputs = gen_data_quest_block_select_paged_w(
        batch=6, tokens_since_metadata_update=21, longest=700, update="unaligned", device=device
    )
    scalar = select(inputs, 9, "in_out_w")
    inputs.metadata_seq_lens = (inputs.seq_lens - 21).clamp(min=0).to(torch.int32)
    inputs.tokens_since_metadata_update = -1
    assert_indices_equal(select(inputs, 9, "out"), scalar)


EXTENSIVE = Grid(
    {
        **AXES,
        "heads": ((4, 1), (15, 5), (128, 64)),
        "metadata_blocks": (1, 4, 60),
        "k": (1, 8, 64),
        "tokens": (0, 16, 127),
        "update": ("aligned", "unaligned"),
        "window": ("scalar", "per_request"),
    },
    keep=fits,
)


@pytest.mark.extensive(full=EXTENSIVE.all, sample=EXTENSIVE.sample(80))
def test_extensive(case: dict, device: torch.device) -> None:
    case = dict(case)
    k, tokens, rows = case.pop("k"), case.pop("tokens"), case.pop("rows")
    num_heads, num_kv_heads = case.pop("heads")
    block_size = 16 if rows == 1 else rows
    inputs = gen_data_quest_block_select_paged_w(
        tokens_since_metadata_update=tokens,
        longest=case.pop("metadata_blocks") * rows * block_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=SWEEP_HEAD_DIM,
        rows=rows,
        block_size=block_size if rows == 1 else None,
        values="exact",
        device=device,
        **case,
    )
    in_out = case["window"] == "scalar" and rows > 1
    check(inputs, k, interface="in_out_w" if in_out else "out", exact=True)


LARGE_AXES = {
    "dtype": DTYPES,
    "batch": (1, 8, 32),
    "longest": (128 * 512, 128 * 1024),
    "lengths": ("equal", "ragged"),
    "update": ("aligned", "unaligned"),
}
LARGE = Grid(LARGE_AXES)
LARGE_SAMPLE = Grid({**LARGE_AXES, "batch": (2,)}).sample(3)


@pytest.mark.large(full=LARGE.all, sample=LARGE_SAMPLE)
def test_large(case: dict, device: torch.device) -> None:
    """Up to 131,072 tokens per request, at the original's shape."""
    inputs = gen_data_quest_block_select_paged_w(
        tokens_since_metadata_update=128 + 77,
        rows=128,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        values="tiled",
        device=device,
        **case,
    )
    check(inputs, 64, interface="in_out_w")


if __name__ == "__main__":
    print(smoke(device_or_exit(script_parser(__doc__).parse_args().device)))

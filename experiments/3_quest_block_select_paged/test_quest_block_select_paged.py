"""quest_block_select_paged against its reference; as a script, a smoke test."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from common.compare import assert_indices_equal, assert_selection_matches, assert_written
from common.devices import device_or_exit, script_parser
from common.layouts import CACHE_LAYOUTS, clone_with_storage, strided_full
from common.paged import make_seq_lens
from common.sweeps import DTYPES, Grid, parametrize
from gen_data_quest_block_select_paged import SelectInputs, gen_data_quest_block_select_paged
from ref_quest_block_select_paged import SelectionReference, quest_block_select_paged_ref
from select_attn_ops import (
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
)

INTERFACES = ("k", "out", "in_out", "in_out_w")


def select(
    inputs: SelectInputs, k: int, interface: str, layout: str = "contiguous"
) -> torch.Tensor:
    """Run the operator through one of its interfaces and return the indices.

    Parameters
    ----------
    inputs : SelectInputs
        Arguments; their storage must not change.
    k : int
        Slots per KV head.
    interface : str
        ``"k"``: a new result. ``"out"``: a given one. ``"in_out"`` and ``"in_out_w"``: the
        original's functions.
    layout : str
        Layout of a given result, around which nothing may be written.
    """
    with inputs.unchanged():
        if interface == "k":
            return quest_block_select_paged(*inputs.positional, k, **inputs.keywords)
        shape = (inputs.query.shape[0], inputs.maxblocks.shape[2], k)
        out = strided_full(shape, torch.int32, layout, fill=-77, device=inputs.query.device)
        before = clone_with_storage(out)
        if interface == "out":
            result = quest_block_select_paged(*inputs.positional, out=out, **inputs.keywords)
            assert result is out, "out must be what is returned"
        elif interface == "in_out":
            assert quest_block_select_paged_in_out(*inputs.positional, out) is None
        else:
            tokens = inputs.tokens_since_metadata_update
            assert quest_block_select_paged_in_out_w(*inputs.positional, tokens, out) is None
    assert_written("selected_indices", out, before, out)
    return out


def reference_of(inputs: SelectInputs, k: int) -> SelectionReference:
    """Return the reference for ``inputs``."""
    on_cpu = inputs.map(torch.Tensor.cpu)
    return quest_block_select_paged_ref(*on_cpu.positional, k, **on_cpu.keywords)


def check(
    inputs: SelectInputs,
    k: int,
    *,
    interface: str = "out",
    layout: str = "contiguous",
    exact: bool = False,
) -> None:
    """Run the operator, then the reference, and compare.

    Parameters
    ----------
    inputs, k, interface, layout
        As in `select`.
    exact : bool
        The scores are exact in float32, so the indices must be those of the reference.
    """
    actual = select(inputs, k, interface, layout)
    reference = reference_of(inputs, k)
    assert_selection_matches(actual, reference)
    if exact:
        assert all((error == 0).all() for error in reference.errors), "the data is not exact"
        assert_indices_equal(actual, reference.indices)


def smoke(device: torch.device) -> str:
    """Check one call at the original's shape; return what was checked."""
    seq_lens, k = [128 * 128 * 2, 128 * 40 + 5, 0], 16
    inputs = gen_data_quest_block_select_paged(
        seq_lens, num_heads=32, num_kv_heads=8, head_dim=128, rows=128, device=device
    )
    check(inputs, k)
    return (
        f"quest_block_select_paged on {device}: bfloat16, {len(seq_lens)} requests of {seq_lens} "
        f"tokens, 32 heads, 8 KV heads, k {k}: the blocks reach the reference's scores at every "
        "rank, unused slots hold -1, nothing else was written"
    )


def test_smoke(device: torch.device) -> None:
    smoke(device)


@parametrize(
    Grid(
        {
            "dtype": DTYPES,
            "layout": CACHE_LAYOUTS,
            "rows": (16, 4),
            "values": ("normal", "exact", "special"),
        }
    ).all()
)
def test_basic(case: dict, device: torch.device) -> None:
    layout = case["layout"]
    seq_lens = make_seq_lens("ragged", 5, 16 * 50, 16)
    inputs = gen_data_quest_block_select_paged(seq_lens, block_size=16, device=device, **case)
    check(inputs, 12, layout=layout, exact=case["values"] == "exact")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interface", INTERFACES)
def test_basic_interfaces(interface: str, dtype: torch.dtype, device: torch.device) -> None:
    check(
        gen_data_quest_block_select_paged([700, 3, 0, 256], dtype=dtype, device=device),
        7,
        interface=interface,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_basic_numpy(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("NumPy arrays live on the CPU")
    inputs = gen_data_quest_block_select_paged([700, 16, 0], dtype=dtype)
    actual = quest_block_select_paged(*(tensor.numpy() for tensor in inputs.positional), 9)
    assert type(actual).__module__ == "numpy"
    assert_selection_matches(torch.from_numpy(actual), reference_of(inputs, 9))


EDGES = {
    "empty_batch": {"seq_lens": []},
    "nothing_to_select": {"seq_lens": [0, 0]},
    "empty_tables": {"seq_lens": [0, 0], "columns": 0},
    "length_1": {"seq_lens": [1]},
    "around_a_block": {"seq_lens": [15, 16, 17, 31, 32, 33]},
    "around_a_metadata_block": {"seq_lens": [255, 256, 257, 511, 512, 513]},
    "k_1": {"seq_lens": [700, 16], "k": 1},
    "k_is_all": {"seq_lens": [128], "k": 8},
    "k_is_one_less": {"seq_lens": [129], "k": 8},
    "k_beyond_all": {"seq_lens": [700, 1, 0], "k": 1000},
    "all_but_one": {"seq_lens": [16 * 1000], "k": 999},
    "one_of_many": {"seq_lens": [16 * 5000], "k": 1, "head_dim": 8},
    "many_of_many": {"seq_lens": [16 * 5000], "k": 2048, "head_dim": 8},
    "table_by_kv_block": {"seq_lens": [700, 16, 0], "rows": 1, "block_size": 16},
    "block_size_1": {"seq_lens": [70, 1], "rows": 16, "block_size": 1},
    "one_row_blocks_of_one": {"seq_lens": [70, 1], "rows": 1, "block_size": 1},
    "odd_block_size": {"seq_lens": [700, 13, 14], "rows": 5, "block_size": 13},
    "long_blocks": {"seq_lens": [2**31 - 1, 2**30], "rows": 16, "block_size": 2**25},
    "more_rows_than_blocks": {"seq_lens": [100], "rows": 300, "block_size": 16},
    "one_head": {"seq_lens": [700], "num_heads": 1, "num_kv_heads": 1},
    "one_kv_head": {"seq_lens": [700], "num_heads": 71, "num_kv_heads": 1},
    "no_groups": {"seq_lens": [700], "num_heads": 8, "num_kv_heads": 8},
    "groups_of_3": {"seq_lens": [700], "num_heads": 15, "num_kv_heads": 5},
    "groups_of_128": {"seq_lens": [700], "num_heads": 128, "num_kv_heads": 1},
    "many_kv_heads": {"seq_lens": [700], "num_heads": 128, "num_kv_heads": 64},
    **{
        f"head_dim_{d}": {"seq_lens": [700, 7], "head_dim": d}
        for d in (1, 2, 7, 8, 15, 33, 65, 100, 128, 129, 256, 300)
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["normal", "unordered", "exact", "ties", "special"])
@pytest.mark.parametrize("edge", EDGES)
def test_edge(edge: str, values: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = {"k": 9, **EDGES[edge], "values": values, "dtype": dtype}
    k = arguments.pop("k")
    inputs = gen_data_quest_block_select_paged(device=device, **arguments)
    check(inputs, k, exact=values in ("exact", "ties"))


def _one_channel(maxima: list[float], minima: list[float], device: torch.device) -> SelectInputs:
    """Return one request whose block ``j`` scores ``max(maxima[j], minima[j])``."""
    inputs = gen_data_quest_block_select_paged(
        [len(maxima)],
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        rows=len(maxima),
        block_size=1,
        dtype=torch.float32,
        device=device,
    )
    inputs.query.fill_(1)
    block = int(inputs.metadata_block_tables[0, 0])
    inputs.maxblocks[block, :, 0, 0] = torch.tensor(maxima).to(device)
    inputs.minblocks[block, :, 0, 0] = torch.tensor(minima).to(device)
    return inputs


NAN, INF = float("nan"), float("inf")
ORDERS = {
    "nan_first": (
        [1, NAN, 5, INF, NAN, -INF, 5],
        [1, 7, 5, INF, NAN, -INF, 5],
        [1, 4, 3, 2, 6, 0, 5],
    ),
    "nan_in_minima_only": ([1, 9, 3], [0, 9, NAN], [2, 1, 0]),
    "nan_in_maxima_only": ([1, 9, NAN], [0, 9, 3], [2, 1, 0]),
    "all_nan": ([NAN] * 5, [NAN] * 5, [0, 1, 2, 3, 4]),
    "nan_of_both_signs": ([-NAN, INF, NAN, -NAN], [-NAN, INF, NAN, -NAN], [0, 2, 3, 1]),
    "zeros_of_both_signs": (
        [-0.0, 0.0, -0.0, 0.0, -1.0],
        [-0.0, -0.0, -0.0, 0.0, -1],
        [0, 1, 2, 3, 4],
    ),
    "zero_above_the_least_negative": ([-2e-38, -0.0, -1e-30], [-2e-38, -0.0, -1e-30], [1, 0, 2]),
    "all_minus_infinity": ([-INF] * 4, [-INF] * 4, [0, 1, 2, 3]),
    "minima_above_maxima": ([1, 2, 3], [9, 8, 7], [0, 1, 2]),
    "sum_is_not_needed": ([3, 1, 2], [-9, -1, -5], [0, 2, 1]),
}


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("name", ORDERS)
def test_edge_order(name: str, k: int, device: torch.device) -> None:
    """Orders worked out by hand, for the operator and for the reference."""
    maxima, minima, order = ORDERS[name]
    inputs = _one_channel(maxima, minima, device)
    expected = torch.tensor([*order, *[-1] * k][:k], dtype=torch.int32).view(1, 1, k)
    assert_indices_equal(select(inputs, k, "out"), expected)
    assert_indices_equal(reference_of(inputs, k).indices, expected)


@pytest.mark.parametrize("specials", [[NAN], [INF], [-INF], [INF, -INF], [0.0, INF]])
def test_edge_special_query(specials: list[float], device: torch.device) -> None:
    inputs = gen_data_quest_block_select_paged([700, 300], device=device)
    inputs.query[0, : len(specials), 5] = torch.tensor(specials).to(inputs.query)
    check(inputs, 9)


def test_edge_mean_is_one_division(device: torch.device) -> None:
    """Seven heads of 1 and 3: times the float32 reciprocal of 7, the means are 1 and above 3."""
    inputs = gen_data_quest_block_select_paged(
        [2], num_heads=7, num_kv_heads=1, head_dim=2, rows=2, block_size=1, device=device
    )
    inputs.query[:] = torch.tensor([1.0, 3.0]).to(inputs.query)
    rows = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]).to(inputs.maxblocks)
    block = int(inputs.metadata_block_tables[0, 0])
    inputs.maxblocks[block] = inputs.minblocks[block] = rows
    assert select(inputs, 2, "out").tolist() == [[[0, 1]]]


def test_edge_shared_metadata(device: torch.device) -> None:
    """Requests that share a prefix share its rows, in a table by physical KV block."""
    inputs = gen_data_quest_block_select_paged([700, 640, 16], rows=1, block_size=16, device=device)
    inputs.metadata_block_tables[1, :40] = inputs.metadata_block_tables[0, :40].clone()
    inputs.metadata_block_tables[2, :1] = inputs.metadata_block_tables[0, :1].clone()
    check(inputs, 20)


@pytest.mark.parametrize("values", ["normal", "special"])
def test_edge_batch_does_not_matter(values: str, device: torch.device) -> None:
    """A request's selection is the same, run again, alone, or with others."""
    inputs = gen_data_quest_block_select_paged(
        [16 * 300, 0, 700, 16 * 1000 - 3], values=values, device=device
    )
    together = select(inputs, 33, "out")
    assert_indices_equal(select(inputs, 33, "k"), together)
    for b in range(len(together)):
        assert_indices_equal(select(inputs.requests(b, b + 1), 33, "k"), together[b : b + 1])


def sweep_inputs(
    *,
    batch: int,
    heads: tuple[int, int],
    metadata_blocks: int,
    rows: int,
    lengths: str,
    device: torch.device,
    **options: object,
) -> SelectInputs:
    """Make the inputs of one point of a sweep."""
    block_size = 16 if rows == 1 else rows
    seq_lens = make_seq_lens(lengths, batch, metadata_blocks * rows * block_size, block_size)
    return gen_data_quest_block_select_paged(
        seq_lens,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        rows=rows,
        block_size=block_size if rows == 1 else None,
        device=device,
        **options,
    )


SWEEP_HEAD_DIM = 32


def fits(
    *, batch: int, heads: tuple[int, int], metadata_blocks: int, rows: int, **_: object
) -> bool:
    """Return whether a pool of float32 stays below 4 MiB."""
    return batch * heads[1] * metadata_blocks * rows * SWEEP_HEAD_DIM <= 1 << 20


AXES = {
    "dtype": DTYPES,
    "batch": (1, 3, 32),
    "heads": ((1, 1), (4, 1), (128, 1), (15, 5), (32, 8), (64, 64), (128, 64)),
    "metadata_blocks": (1, 2, 3, 4, 5, 6, 60),
    "rows": (16, 1),
    "k": (1, 8, 33, 64),
    "lengths": ("equal", "ragged"),
}
EXTENSIVE = Grid({**AXES, "values": ("exact", "special")}, keep=fits)


@pytest.mark.extensive(full=EXTENSIVE.all, sample=EXTENSIVE.sample(80))
def test_extensive(case: dict, device: torch.device) -> None:
    case = dict(case)
    k = case.pop("k")
    check(
        sweep_inputs(head_dim=SWEEP_HEAD_DIM, device=device, **case),
        k,
        exact=case["values"] == "exact",
    )


LARGE_AXES = {
    "dtype": DTYPES,
    "batch": (1, 8, 32),
    "metadata_blocks": (4, 8),
    "k": (16, 64),
    "lengths": ("equal", "ragged"),
}
LARGE = Grid(LARGE_AXES)
LARGE_SAMPLE = Grid({**LARGE_AXES, "batch": (2,)}).sample(3)


@pytest.mark.large(full=LARGE.all, sample=LARGE_SAMPLE)
def test_large(case: dict, device: torch.device) -> None:
    """Up to 131,072 tokens per request, at the original's shape."""
    case = dict(case)
    k = case.pop("k")
    inputs = sweep_inputs(
        heads=(32, 8), rows=128, head_dim=128, values="tiled", device=device, **case
    )
    check(inputs, k)


if __name__ == "__main__":
    print(smoke(device_or_exit(script_parser(__doc__).parse_args().device)))

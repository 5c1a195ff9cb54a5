"""selected_block_tables against its reference; as a script, a smoke test."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from common.compare import assert_written
from common.devices import device_or_exit, script_parser
from common.layouts import CACHE_LAYOUTS, clone_with_storage, strided_full
from common.paged import make_seq_lens
from common.sweeps import Grid, parametrize
from gen_data_selected_block_tables import TablesInputs, gen_data_selected_block_tables
from ref_selected_block_tables import selected_block_tables_ref
from select_attn_ops import selected_block_tables


def check(inputs: TablesInputs, *, layout: str | None = None) -> None:
    """Compare the operator with its reference; with ``layout``, the results are given strided."""
    shape, device = tuple(inputs.selected_indices.shape), inputs.seq_lens.device
    results = {}
    if layout is not None:
        results = {
            "out": strided_full(shape, torch.int32, layout, device=device),
            "lens_out": strided_full(shape[:2], torch.int32, layout, device=device),
        }
    before = {name: clone_with_storage(view) for name, view in results.items()}
    with inputs.unchanged():
        actual = selected_block_tables(*inputs.positional, block_size=inputs.block_size, **results)
    expected = selected_block_tables_ref(
        *inputs.map(torch.Tensor.cpu).positional, block_size=inputs.block_size
    )
    for name, view, value in zip(("out", "lens_out"), actual, expected, strict=True):
        assert view.dtype == torch.int32
        assert view.shape == value.shape
        if layout is not None:
            assert view is results[name], f"{name} must be what is returned"
        assert_written(name, view, before.get(name, view), value)


def smoke(device: torch.device) -> str:
    """Check one small selection; return what was checked."""
    inputs = gen_data_selected_block_tables([100, 7, 0], 4, device=device)
    check(inputs)
    return (
        f"selected_block_tables on {device}: the tables and lengths of 3 requests, 2 KV heads and "
        "4 slots are those of the reference"
    )


def test_smoke(device: torch.device) -> None:
    smoke(device)


@parametrize(
    Grid(
        {
            "selection": ("distinct", "scattered", "repeated"),
            "layout": CACHE_LAYOUTS,
            "k": (1, 5, 16, 70),
        }
    ).all()
)
def test_basic(case: dict, device: torch.device) -> None:
    layout = case["layout"]
    seq_lens = make_seq_lens("ragged", 7, 1000, 16)
    check(gen_data_selected_block_tables(seq_lens, device=device, **case), layout=layout)


def test_basic_new_results(device: torch.device) -> None:
    check(gen_data_selected_block_tables([100, 17], 8, device=device))


EDGES = {
    "empty_batch": {"seq_lens": []},
    "empty_tables": {"seq_lens": [0, 0], "spare_columns": 0},
    "around_a_block": {"seq_lens": [1, 15, 16, 17, 31, 32, 33]},
    "block_size_1": {"seq_lens": [1, 9], "block_size": 1},
    "odd_block_size": {"seq_lens": [100, 13, 14], "block_size": 13},
    "one_head": {"seq_lens": [100], "num_kv_heads": 1},
    "many_heads": {"seq_lens": [100, 3], "num_kv_heads": 64},
    "nothing_selected": {"seq_lens": [0], "spare_columns": 3},
    "longest_request": {"seq_lens": [2**31 - 1], "block_size": 2**20},
    "wide_selection": {"seq_lens": [16 * 3000], "k": 2500},
}


@pytest.mark.parametrize("selection", ["distinct", "scattered", "repeated"])
@pytest.mark.parametrize("edge", EDGES)
def test_edge(edge: str, selection: str, device: torch.device) -> None:
    arguments = {"k": 9, **EDGES[edge], "selection": selection}
    check(gen_data_selected_block_tables(device=device, **arguments))


EXTENSIVE = Grid(
    {
        "batch": (1, 2, 5, 32),
        "num_kv_heads": (1, 3, 8, 64),
        "longest": (1, 200, 128 * 768),
        "block_size": (16, 64, 128),
        "k": (1, 3, 8, 17, 64),
        "lengths": ("equal", "ragged"),
        "selection": ("distinct", "scattered", "repeated"),
    }
)


@pytest.mark.extensive(full=EXTENSIVE.all, sample=EXTENSIVE.sample(24))
def test_extensive(case: dict, device: torch.device) -> None:
    case = dict(case)
    block_size = case["block_size"]
    seq_lens = make_seq_lens(
        case.pop("lengths"), case.pop("batch"), case.pop("longest"), block_size
    )
    check(gen_data_selected_block_tables(seq_lens, device=device, **case))


if __name__ == "__main__":
    print(smoke(device_or_exit(script_parser(__doc__).parse_args().device)))

"""Time and bandwidth of quest_block_select_paged_in_out_w at the original's shapes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: F401  (makes experiment 3 importable)
import torch
from benchmark_quest_block_select_paged import run_all
from gen_data_quest_block_select_paged import SelectInputs
from select_attn_ops import quest_block_select_paged_in_out_w

# Half way between two updates.
TOKENS_SINCE_METADATA_UPDATE = 64


def operator(inputs: SelectInputs, out: torch.Tensor) -> None:
    """Run the operator as its users call it."""
    tokens = inputs.tokens_since_metadata_update
    quest_block_select_paged_in_out_w(*inputs.positional, tokens, out)


if __name__ == "__main__":
    run_all(__doc__, "quest_block_select_paged_in_out_w", operator, TOKENS_SINCE_METADATA_UPDATE)

"""Predict which KV-cache blocks a decode step must read, and read only those."""

from .merge_attention_states import merge_attention_states
from .paged_select_attention import (
    paged_select_attention,
    paged_select_attention_workspace_size,
)
from .quest_block_select_paged import (
    quest_block_select_paged,
    quest_block_select_paged_in_out,
    quest_block_select_paged_in_out_w,
    quest_block_select_paged_workspace_size,
)
from .quest_decoder import QuestDecoder
from .quest_prefill_metadata import quest_prefill_metadata
from .runtime import get_num_threads, set_num_threads, version
from .selected_block_tables import selected_block_tables

__all__ = [
    "QuestDecoder",
    "get_num_threads",
    "merge_attention_states",
    "paged_select_attention",
    "paged_select_attention_workspace_size",
    "quest_block_select_paged",
    "quest_block_select_paged_in_out",
    "quest_block_select_paged_in_out_w",
    "quest_block_select_paged_workspace_size",
    "quest_prefill_metadata",
    "selected_block_tables",
    "set_num_threads",
]

__version__ = version()

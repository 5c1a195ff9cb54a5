"""Inputs of the windowed selection: requests that decoded since their metadata was updated."""

from __future__ import annotations

from typing import Any

from common.paged import make_seq_lens
from gen_data_quest_block_select_paged import SelectInputs, gen_data_quest_block_select_paged


def gen_data_quest_block_select_paged_w(
    *,
    batch: int,
    tokens_since_metadata_update: int,
    longest: int,
    lengths: str = "ragged",
    update: str = "aligned",
    window: str = "scalar",
    rows: int = 16,
    block_size: int | None = None,
    **options: Any,
) -> SelectInputs:
    """Make the inputs of one call.

    The metadata of window and sink blocks is poisoned; so are their table entries, unless they
    share a metadata block with scored ones.

    Parameters
    ----------
    batch : int
        Number of requests.
    tokens_since_metadata_update : int
        Tokens each request decoded since the update.
    longest : int
        Tokens of the longest request.
    lengths : str
        ``"equal"`` or ``"ragged"``.
    update : str
        ``"aligned"``: every request had whole KV blocks at the update. ``"unaligned"``: none had,
        but for those of length 0.
    window : str
        ``"scalar"``: told by ``tokens_since_metadata_update``. ``"per_request"``: told by
        ``metadata_seq_lens``, and every request decoded a different number of tokens.
    rows, block_size, options
        As in `gen_data_quest_block_select_paged`.
    """
    tokens = rows if block_size is None else block_size
    known = make_seq_lens(lengths, batch, max(longest - tokens_since_metadata_update, 0), tokens)
    known = [length // tokens * tokens for length in known]
    if update == "unaligned":
        known = [max(length - 1 - b % max(tokens - 1, 1), 0) for b, length in enumerate(known)]
    per_request = window == "per_request"
    decoded = [max(tokens_since_metadata_update - 5 * b * per_request, 0) for b in range(batch)]
    return gen_data_quest_block_select_paged(
        [length + new for length, new in zip(known, decoded, strict=True)],
        rows=rows,
        block_size=block_size,
        tokens_since_metadata_update=-1 if per_request else tokens_since_metadata_update,
        metadata_seq_lens=known if per_request else None,
        **options,
    )

"""Sparse decode steps over a paged KV cache: what an engine would otherwise write by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._library import torch
from .paged_select_attention import paged_select_attention, paged_select_attention_workspace_size
from .quest_block_select_paged import (
    quest_block_select_paged,
    quest_block_select_paged_workspace_size,
)
from .quest_prefill_metadata import quest_prefill_metadata

if TYPE_CHECKING:
    from torch import Tensor


class QuestDecoder:
    """Metadata, selection and attention of one layer's paged KV cache.

    A decode step is three calls: write the metadata of the KV blocks that filled, select `k` blocks
    per request and KV head, attend to them. The decoder owns what they need besides the cache, all
    of it allocated here.

    Metadata belongs to *physical* KV blocks: requests that share a prefix share its metadata, and
    blocks may be freed and given to another request without a word to the decoder. A block's
    metadata is used only while the block is full, and is written when it fills: by `prefill` or
    `update`, which must hear of all tokens. Whoever copies a full block to another place in the
    cache copies its rows of `maxblocks` and `minblocks` too.

    Parameters
    ----------
    k_cache, v_cache : torch.Tensor
        ``[num_kv_blocks, block_size, N, D]``, float16, bfloat16 or float32, with any strides as
        long as the last dimension is contiguous. The cache itself: the engine goes on writing to
        it.
    num_heads : int
        Query heads `H`, a multiple of `N`.
    k : int
        Blocks to attend to per request and KV head, those that are forced included.
    max_batch : int
        Requests of a step, at most.
    max_blocks : int
        KV blocks of a request, at most: columns of the block tables.
    recent_blocks : int
        Full blocks, the newest ones of a request, that go before all scored ones, as do the block
        being filled (before them) and the first block (behind them).
    dense_below : int
        Tokens up to which a step with a `max_seq_len` attends to everything, without a selection.
        Default: ``2 * k * block_size``.
    scale : float, optional
        Of the dot products. Default: ``D ** -0.5``.

    Attributes
    ----------
    maxblocks, minblocks : torch.Tensor
        ``[num_kv_blocks, 1, N, D]``, dtype of the cache: the metadata of every physical KV block.

    Raises
    ------
    ValueError
        If the caches are not of one shape, dtype and device, or a number is out of range.
        Everything else that is wrong is found by the operators, with the first step.

    Notes
    -----
    *CUDA graphs.* No step reads device data on the host, and nothing is allocated, so that a step
    can be captured and replayed with other lengths and tables. A request with no more than `k`
    blocks attends to all of them, in the same launches. What a graph cannot do is take the dense
    path for some steps: capture one graph with a `max_seq_len` up to `dense_below` and one without.

    *Streams.* One at a time: the steps share buffers, which are filled on the stream that is
    current here.

    *Results* are views of the decoder's buffers unless `out` is given: the next step overwrites
    them.

    Examples
    --------
    >>> import torch
    >>> from select_attn_ops import QuestDecoder
    >>> k_cache, v_cache = torch.randn(2, 64, 16, 2, 32).unbind(0)
    >>> decoder = QuestDecoder(k_cache, v_cache, num_heads=8, k=4, max_batch=1, max_blocks=64)
    >>> block_tables = torch.arange(64, dtype=torch.int32).view(1, 64)
    >>> seq_lens = torch.tensor([1000], dtype=torch.int32)
    >>> decoder.prefill(block_tables, seq_lens)
    >>> seq_lens += 1  # after the keys and values of the next token are in the cache
    >>> out = decoder.step(torch.randn(1, 8, 32), block_tables, seq_lens)
    >>> out.shape
    torch.Size([1, 8, 32])
    """

    def __init__(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        num_heads: int,
        k: int,
        max_batch: int,
        max_blocks: int,
        recent_blocks: int = 1,
        dense_below: int | None = None,
        scale: float | None = None,
    ) -> None:
        if torch is None:
            raise ImportError("QuestDecoder needs torch, which cannot be imported")
        if k_cache.ndim != 4:
            raise ValueError(f"k_cache must have 4 dimensions, got {k_cache.ndim}")
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(k_cache, what), getattr(v_cache, what)
            if got != expected:
                raise ValueError(f"v_cache must have {what} {expected} as k_cache, got {got}")
        for name, value, least in (
            ("num_heads", num_heads, 1),
            ("k", k, 1),
            ("max_batch", max_batch, 1),
            ("max_blocks", max_blocks, 1),
            ("recent_blocks", recent_blocks, 0),
            ("dense_below", dense_below, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        num_kv_blocks, self._block_size, num_kv_heads, head_dim = k_cache.shape
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of the {num_kv_heads} KV heads, got {num_heads}"
            )
        self._k_cache, self._v_cache = k_cache, v_cache
        self._max_blocks = max_blocks
        self._recent_tokens = recent_blocks * self._block_size
        self._scale = scale
        self._dense_below = 2 * k * self._block_size if dense_below is None else dense_below

        def new(*shape: int, dtype: Any = torch.int32) -> Tensor:
            made: Tensor = torch.empty(shape, dtype=dtype, device=k_cache.device)
            return made

        rows = (num_kv_blocks, 1, num_kv_heads, head_dim)
        # Zeros, so that what the selection might read of a block that never filled is no NaN; it
        # does not, unless lengths and tables contradict each other.
        self.maxblocks = torch.zeros(rows, dtype=k_cache.dtype, device=k_cache.device)
        self.minblocks = torch.zeros_like(self.maxblocks)
        self._full_lens = new(max_batch)
        self._known_lens = new(max_batch)
        self._selected = new(max_batch, num_kv_heads, k)
        dense_blocks = min(max_blocks, -(-self._dense_below // self._block_size)) or 1
        self._every_number = torch.arange(dense_blocks, dtype=torch.int32, device=k_cache.device)
        self._all_blocks = new(max_batch, dense_blocks)
        self._exists = new(max_batch, dense_blocks, dtype=torch.bool)
        self._no_block = torch.tensor(-1, dtype=torch.int32, device=k_cache.device)
        self._out = new(max_batch, num_heads, head_dim, dtype=k_cache.dtype)

        query, tables = torch.empty_like(self._out), new(max_batch, max_blocks)
        select_bytes = quest_block_select_paged_workspace_size(
            query,
            self.maxblocks,
            self.minblocks,
            tables,
            self._full_lens,
            self._selected,
            block_size=self._block_size,
        )
        attend_bytes = max(
            paged_select_attention_workspace_size(
                query, k_cache, v_cache, tables, self._full_lens, blocks, self._out
            )
            for blocks in (self._selected, self._for_every_head(self._all_blocks))
        )
        self._select_workspace = self._workspace(select_bytes)
        self._attend_workspace = self._workspace(attend_bytes)

    def prefill(self, block_tables: Tensor, seq_lens: Tensor) -> None:
        """Make the metadata of requests whose keys are in the cache.

        Parameters
        ----------
        block_tables : torch.Tensor
            ``[B, MKBPR]``, int32: physical KV block of each logical block; `MKBPR` at most
            `max_blocks`.
        seq_lens : torch.Tensor
            ``[B]``, int32: tokens in the cache.
        """
        self._check(block_tables, seq_lens)
        self._write_metadata(block_tables, self._full_tokens(seq_lens), None)

    def update(
        self, block_tables: Tensor, seq_lens: Tensor, computed_lens: Tensor | None = None
    ) -> None:
        """Bring the metadata up to date with new tokens: of the KV blocks that they filled.

        Parameters
        ----------
        block_tables, seq_lens : torch.Tensor
            As for `prefill`, the new tokens included.
        computed_lens : torch.Tensor, optional
            ``[B]``, int32: tokens that the metadata has seen already, as for a prefill in chunks.
            Default: all but one of each request.
        """
        self._check(block_tables, seq_lens, computed_lens)
        self._update(block_tables, seq_lens, computed_lens, self._full_tokens(seq_lens))

    def select(self, query: Tensor, block_tables: Tensor, seq_lens: Tensor) -> Tensor:
        """Select blocks: the one being filled, the newest full ones, the first, then the best.

        Parameters
        ----------
        query : torch.Tensor
            ``[B, H, D]``, dtype of the cache: one token per request.
        block_tables, seq_lens : torch.Tensor
            As for `update`, after which this is called.

        Returns
        -------
        torch.Tensor
            ``[B, N, k]``, int32: numbers of blocks in each request, -1 behind the last.
        """
        self._check(block_tables, seq_lens)
        return self._select(query, block_tables, seq_lens, self._full_tokens(seq_lens))

    def attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        selected: Tensor,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attend to selected blocks; see `paged_select_attention`.

        Parameters
        ----------
        query, block_tables, seq_lens : torch.Tensor
            As for `select`.
        selected : torch.Tensor
            ``[B, N, k]``, int32, as `select` returns it.
        out : torch.Tensor, optional
            ``[B, H, D]``, dtype of `query`. Default: a buffer of the decoder.
        lse : torch.Tensor, optional
            ``[B, H]``, float32. Default: not written.

        Returns
        -------
        torch.Tensor
            `out`.
        """
        result: Tensor = paged_select_attention(
            query,
            self._k_cache,
            self._v_cache,
            block_tables,
            seq_lens,
            selected,
            scale=self._scale,
            out=self._out[: len(seq_lens)] if out is None else out,
            lse=lse,
            workspace=self._attend_workspace,
        )
        return result

    def step(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        *,
        computed_lens: Tensor | None = None,
        max_seq_len: int | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Decode one token per request: `update`, then `select` and `attend`.

        Parameters
        ----------
        query, block_tables, seq_lens : torch.Tensor
            As for `select`. Keys and values of the token are in the cache already.
        computed_lens : torch.Tensor, optional
            As for `update`. Needed where a request got more than one token since the last step, as
            in speculative decoding.
        max_seq_len : int, optional
            What no length exceeds, as far as the caller knows without looking at the device. Up to
            `dense_below`, attention goes to all blocks, without a selection.
        out, lse : torch.Tensor, optional
            As for `attend`.

        Returns
        -------
        torch.Tensor
            ``[B, H, D]``: `out`, or a buffer of the decoder, which the next step overwrites.

        Raises
        ------
        ValueError
            If there are more requests than `max_batch`, more columns than `max_blocks`, or, on the
            CPU, a length exceeds a `max_seq_len` of the dense path; else as the operators, which
            may find a wrong `query` when the metadata is up to date already.
        """
        is_dense = False
        if max_seq_len is not None:
            is_dense = max_seq_len <= self._dense_below
            on_cpu = seq_lens.is_cpu and len(seq_lens) > 0
            if is_dense and on_cpu and int(seq_lens.max()) > max_seq_len:
                raise ValueError(f"a length exceeds max_seq_len, {max_seq_len}")
        self._check(block_tables, seq_lens, computed_lens)
        full = self._full_tokens(seq_lens)
        self._update(block_tables, seq_lens, computed_lens, full)
        if is_dense:
            selected = self._every_block(seq_lens)
        else:
            selected = self._select(query, block_tables, seq_lens, full)
        return self.attend(query, block_tables, seq_lens, selected, out=out, lse=lse)

    def _check(
        self, block_tables: Tensor, seq_lens: Tensor, computed_lens: Tensor | None = None
    ) -> None:
        """What torch would convert or broadcast, and what does not fit into the buffers."""
        max_batch, max_blocks = len(self._full_lens), self._max_blocks
        for name, lens in (("seq_lens", seq_lens), ("computed_lens", computed_lens)):
            if lens is None:
                continue
            if lens.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {lens.dtype}")
            if lens.ndim != 1 or len(lens) > max_batch:
                raise ValueError(f"{name} must be [{max_batch}] at most, got {list(lens.shape)}")
            if lens.device != self._k_cache.device:
                raise ValueError(
                    f"{name} must be on {self._k_cache.device} as k_cache, got {lens.device}"
                )
        if computed_lens is not None and len(computed_lens) != len(seq_lens):
            raise ValueError(f"computed_lens must be [{len(seq_lens)}], got [{len(computed_lens)}]")
        if block_tables.ndim != 2 or block_tables.shape[1] > max_blocks:
            raise ValueError(
                f"block_tables must be [*, {max_blocks}] at most, got {list(block_tables.shape)}"
            )

    def _full_tokens(self, seq_lens: Tensor) -> Tensor:
        """Tokens in full blocks, in a buffer."""
        return self._to_full_blocks(self._full_lens[: len(seq_lens)].copy_(seq_lens))

    def _to_full_blocks(self, lens: Tensor) -> Tensor:
        return lens.div_(self._block_size, rounding_mode="floor").mul_(self._block_size)

    def _update(
        self, block_tables: Tensor, seq_lens: Tensor, computed_lens: Tensor | None, full: Tensor
    ) -> None:
        known = self._known_lens[: len(seq_lens)]
        if computed_lens is None:
            torch.sub(seq_lens, 1, out=known)
            known.clamp_(min=0)  # slots of no tokens
        else:
            known.copy_(computed_lens)
        self._write_metadata(block_tables, full, self._to_full_blocks(known))

    def _select(
        self, query: Tensor, block_tables: Tensor, seq_lens: Tensor, full: Tensor
    ) -> Tensor:
        known = self._known_lens[: len(seq_lens)]
        torch.sub(full, self._recent_tokens, out=known)
        known.clamp_(min=0)
        selected: Tensor = quest_block_select_paged(
            query,
            self.maxblocks,
            self.minblocks,
            block_tables,
            seq_lens,
            metadata_seq_lens=known,
            block_size=self._block_size,
            out=self._selected[: len(seq_lens)],
            workspace=self._select_workspace,
        )
        return selected

    def _write_metadata(self, block_tables: Tensor, full: Tensor, known: Tensor | None) -> None:
        quest_prefill_metadata(
            self._k_cache,
            block_tables,
            full,
            block_tables,
            self.maxblocks,
            self.minblocks,
            metadata_seq_lens=known,
        )

    def _every_block(self, seq_lens: Tensor) -> Tensor:
        batch = len(seq_lens)
        total = self._known_lens[:batch]
        torch.add(seq_lens, self._block_size - 1, out=total)
        total.div_(self._block_size, rounding_mode="floor")
        exists = torch.lt(self._every_number, total[:, None], out=self._exists[:batch])
        every = torch.where(
            exists, self._every_number, self._no_block, out=self._all_blocks[:batch]
        )
        return self._for_every_head(every)

    def _for_every_head(self, blocks: Tensor) -> Tensor:
        return blocks[:, None].expand(-1, self._k_cache.shape[2], -1)

    def _workspace(self, num_bytes: int) -> Tensor | None:
        if num_bytes == 0:
            return None
        workspace: Tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=self._k_cache.device)
        return workspace

"""Sparse decode steps over a paged KV cache: what an engine would otherwise write by hand."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from ._library import argument, check_tensor, dtype_name, integer, is_torch, optional_number, torch
from ._torch_ops import takes_over
from .paged_select_attention import paged_select_attention, paged_select_attention_workspace_size
from .quest_block_select_paged import (
    quest_block_select_paged,
    quest_block_select_paged_workspace_size,
)
from .quest_prefill_metadata import quest_prefill_metadata

if TYPE_CHECKING:
    from torch import Tensor

_CACHE_DIMS = ("num_kv_blocks", "block_size", "N", "D")
# Of the arguments of the methods, as the operators spell them.
_DIMS = {
    "query": "[B, H, D]",
    "block_tables": "[B, MKBPR]",
    "seq_lens": "[B]",
    "computed_lens": "[B]",
    "selected": "[B, N, k]",
    "out": "[B, H, D]",
    "lse": "[B, H]",
}
_WRITTEN = ("out", "lse")
_OWN_OUT = "the decoder's own out"
_MAX_INT32 = 2**31 - 1
# The operator's own limit: it multiplies by scale * log2(e) in float32.
_MAX_SCALE = (2.0**128 - 2.0**104) * math.log(2)


class QuestDecoder:
    """Metadata, selection and attention of one layer's paged KV cache.

    A decode step is three calls: write the metadata of the KV blocks that filled, select `k` blocks
    per request and KV head, attend to them. The decoder owns what they need besides the cache, all
    of it allocated here.

    Metadata belongs to *physical* KV blocks: requests that share a prefix share its metadata, and
    blocks may be freed and given to another request without a word to the decoder. A block's
    metadata is used only while the block is full, and is written when it fills: by `prefill`,
    `update` or `step`, which must hear of all tokens. Nobody notices if they do not: a block
    without metadata is ranked by what its row holds, zeros or the metadata of keys that it held
    before. Whoever copies a full block to another place in the cache copies its rows of `maxblocks`
    and `minblocks` too. docs/porting.md has recipes for what schedulers do.

    Parameters
    ----------
    k_cache, v_cache : torch.Tensor
        ``[num_kv_blocks, block_size, N, D]``, float16, bfloat16 or float32, with any strides as
        long as the last dimension is contiguous. The cache itself: the engine goes on writing to
        it.
    num_heads : int
        Query heads `H`, a multiple of `N`.
    k : int
        Blocks to attend to per request and KV head, those that are forced included: up to
        ``recent_blocks + 2``. With a smaller `k` some of those are left out, the first block
        first; only what is beyond goes by score.
    max_batch : int
        Requests of a step, at most.
    max_blocks : int
        KV blocks of a request, at most: columns of the block tables.
    recent_blocks : int
        Full blocks, the newest ones of a request, that go before all scored ones, as do the block
        being filled (before them) and the first block (behind them).
    dense_below : int
        Tokens up to which a step attends to everything, without a selection. Of no effect unless
        `step` is given a `max_seq_len`. Default: ``k * block_size``, the tokens of a selection:
        beyond them, selecting begins to pay (``python -m select_attn_ops bench`` measures where).
    scale : float, optional
        Of the dot products, finite in float32. Default: ``D ** -0.5``.

    Attributes
    ----------
    maxblocks, minblocks : torch.Tensor
        ``[num_kv_blocks, 1, N, D]``, dtype of the cache: the metadata of every physical KV block.
    num_heads, k, max_batch, max_blocks, block_size, recent_blocks, dense_below, scale
        As given, defaults filled in. Read-only.
    nbytes : int
        Bytes of all that the decoder has allocated. Read-only.

    Raises
    ------
    TypeError
        If a cache is not a torch tensor or of another dtype, or a number is not one.
    ValueError
        If the caches are not of one shape and device, have no memory, heads or tokens, or a number
        is out of range.
    NotImplementedError
        If there is no backend for the device, or a limit of it is exceeded.

    Notes
    -----
    *CUDA graphs.* No step reads device data on the host, and nothing is allocated, so that a step
    can be captured and replayed with other lengths and tables. A request with no more than `k`
    blocks attends to all of them, in the same launches. What a graph cannot do is take the dense
    path for some steps: capture one graph with a `max_seq_len` up to `dense_below` and one without.

    *Streams and threads.* One at a time: the steps share buffers, which are filled on the stream
    that is current here. A decoder is not thread-safe.

    *Results* are views of the decoder's buffers unless `out` is given: the next step overwrites
    them.

    *Memory.* The metadata takes ``1 / block_size`` of what the caches take. The buffers take, per
    request of `max_batch`, a row of the output, ``4 * N * k`` bytes for the selection and ``5``
    bytes per block of `dense_below`; a device's kernels have workspaces besides.

    *Errors* are raised before anything is written, with one exception: on the CPU an entry of
    `block_tables` outside the cache may show only when `step` has updated the metadata. What was
    written is right all the same, and the step can be made again.

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
        _check_caches(k_cache, v_cache)
        num_kv_blocks, block_size, num_kv_heads, head_dim = k_cache.shape
        self._num_heads = _at_least(1, "num_heads", num_heads)
        self._k = _at_least(1, "k", k)
        self._max_batch = _at_least(1, "max_batch", max_batch)
        self._max_blocks = _at_least(1, "max_blocks", max_blocks)
        self._recent_blocks = _at_least(0, "recent_blocks", recent_blocks)
        self._dense_below = (
            self._k * block_size
            if dense_below is None
            else _at_least(0, "dense_below", dense_below)
        )
        if self._num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of the {num_kv_heads} KV heads of k_cache, "
                f"got {self._num_heads}"
            )
        self._scale = 1 / math.sqrt(head_dim) if scale is None else _checked_scale(scale)
        self._k_cache, self._v_cache = k_cache, v_cache
        self._device = k_cache.device
        self._block_size = block_size
        # No length is beyond this, so that more blocks than fit into it are all blocks.
        self._recent_tokens = min(self._recent_blocks * block_size, _MAX_INT32)
        dtype, int32 = k_cache.dtype, torch.int32
        self._expected: dict[str, tuple[Any, tuple[int | None, ...]]] = {
            "query": (dtype, (self._num_heads, head_dim)),
            "block_tables": (int32, (None,)),
            "seq_lens": (int32, ()),
            "computed_lens": (int32, ()),
            "selected": (int32, (num_kv_heads, None)),
            "out": (dtype, (self._num_heads, head_dim)),
            "lse": (torch.float32, (self._num_heads,)),
        }
        # What is allocated under inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._allocate(num_kv_blocks, num_kv_heads, head_dim)

    def _allocate(self, num_kv_blocks: int, num_kv_heads: int, head_dim: int) -> None:
        dtype, device = self._k_cache.dtype, self._device
        max_batch, num_heads = self._max_batch, self._num_heads

        def new(*shape: int, dtype: Any = torch.int32) -> Tensor:
            made: Tensor = torch.empty(shape, dtype=dtype, device=device)
            return made

        rows = (num_kv_blocks, 1, num_kv_heads, head_dim)
        # Zeros, so that a block of which nobody told has a rank that can be reproduced.
        self.maxblocks = torch.zeros(rows, dtype=dtype, device=device)
        self.minblocks = torch.zeros_like(self.maxblocks)
        self._full_lens = new(max_batch)
        self._known_lens = new(max_batch)
        self._selected = new(max_batch, num_kv_heads, self._k)
        dense_blocks = min(self._max_blocks, -(-self._dense_below // self._block_size)) or 1
        numbers = torch.arange(dense_blocks, device=device)
        self._every_number = numbers.int()
        # A start that no length reaches need not be exact.
        self._block_starts = (numbers * self._block_size).clamp(max=_MAX_INT32).int()
        self._all_blocks = new(max_batch, dense_blocks)
        self._exists = new(max_batch, dense_blocks, dtype=torch.bool)
        self._no_block = torch.tensor(-1, dtype=torch.int32, device=device)
        self._out = new(max_batch, num_heads, head_dim, dtype=dtype)

        # Only shapes matter: one row stands for all.
        query = new(1, 1, head_dim, dtype=dtype).expand(max_batch, num_heads, head_dim)
        tables = new(1, self._max_blocks).expand(max_batch, self._max_blocks)
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
                query, self._k_cache, self._v_cache, tables, self._full_lens, blocks, self._out
            )
            for blocks in (self._selected, self._for_every_head(self._all_blocks))
        )
        self._select_workspace = self._workspace(select_bytes)
        self._attend_workspace = self._workspace(attend_bytes)

    @property
    def num_heads(self) -> int:
        return self._num_heads

    @property
    def k(self) -> int:
        return self._k

    @property
    def max_batch(self) -> int:
        return self._max_batch

    @property
    def max_blocks(self) -> int:
        return self._max_blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def recent_blocks(self) -> int:
        return self._recent_blocks

    @property
    def dense_below(self) -> int:
        return self._dense_below

    @property
    def scale(self) -> float:
        return self._scale

    @property
    def nbytes(self) -> int:
        return sum(
            value.numel() * value.element_size()
            for value in vars(self).values()
            if is_torch(value) and value is not self._k_cache and value is not self._v_cache
        )

    def __repr__(self) -> str:
        names = ("num_heads", "k", "max_batch", "max_blocks", "recent_blocks", "dense_below")
        numbers = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return (
            f"QuestDecoder({list(self._k_cache.shape)} {dtype_name(self._k_cache.dtype)} on "
            f"{self._device}, {numbers}, scale={self._scale:g}, nbytes={self.nbytes})"
        )

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
        self._check({"block_tables": block_tables, "seq_lens": seq_lens})
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
            ``[B]``, int32, up to `seq_lens`: tokens whose keys are unchanged since the metadata saw
            them. For a prefill in chunks, those of the chunks before; for a prefix-cache hit, those
            that were found; after a rejection of drafted tokens, the accepted length, even where
            the metadata has seen more. Less costs time, more leaves metadata of keys that are gone.
            Default: all but one of each request.
        """
        self._check(
            {"block_tables": block_tables, "seq_lens": seq_lens}, {"computed_lens": computed_lens}
        )
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
        self._check({"query": query, "block_tables": block_tables, "seq_lens": seq_lens})
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
            ``[B, N, k]``, int32, as `select` returns it, of this decoder or of another layer's.
        out : torch.Tensor, optional
            ``[B, H, D]``, dtype of `query`. Default: a buffer of the decoder.
        lse : torch.Tensor, optional
            ``[B, H]``, float32. Default: not written.

        Returns
        -------
        torch.Tensor
            `out`.
        """
        self._check(
            {
                "query": query,
                "block_tables": block_tables,
                "seq_lens": seq_lens,
                "selected": selected,
            },
            {"out": out, "lse": lse},
        )
        return self._attend(query, block_tables, seq_lens, selected, out, lse)

    def _attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        selected: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
    ) -> Tensor:
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
            As for `update`. Needed where more than the last token is new since the last step.
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
        TypeError
            If an argument is not a torch tensor or of another dtype than above.
        ValueError
            If a shape, device or layout is not as above; if there are more requests than
            `max_batch` or more columns than `max_blocks`; if an output overlaps itself or another
            argument; on the CPU also if a length is negative, beyond what the table holds or beyond
            `max_seq_len`, one of `computed_lens` is not in ``[0, seq_len]``, or an entry of the
            table that is read lies outside the cache.
        """
        required = {"query": query, "block_tables": block_tables, "seq_lens": seq_lens}
        optional = {"computed_lens": computed_lens, "out": out, "lse": lse}
        is_dense = False
        if max_seq_len is not None:
            is_dense = _at_least(0, "max_seq_len", max_seq_len) <= self._dense_below
        self._check(required, optional, max_seq_len)
        full = self._full_tokens(seq_lens)
        self._update(block_tables, seq_lens, computed_lens, full)
        if is_dense:
            selected = self._every_block(seq_lens)
        else:
            selected = self._select(query, block_tables, seq_lens, full)
        return self._attend(query, block_tables, seq_lens, selected, out, lse)

    def _check(
        self,
        required: dict[str, Any],
        optional: dict[str, Any] | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        """Raise what the operators would, in the caller's words, before anything is written."""
        if torch.compiler.is_compiling():
            return  # it cannot trace this, and operators in a graph check what they are given
        given = required
        for name, tensor in (optional or {}).items():
            if tensor is not None:
                given = {**given, name: tensor}
        tables = given["block_tables"]
        batch = len(tables) if is_torch(tables) and tables.ndim == 2 else -1
        if not 0 <= batch <= self._max_batch or tables.shape[1] > self._max_blocks:
            self._check_slowly(given)
        for name, tensor in given.items():
            if not self._is_plainly_right(name, tensor, batch):
                self._check_slowly(given)
                break
        seq_lens = given["seq_lens"]
        if takes_over((seq_lens,)):
            return  # tensors may have no memory
        if "out" in given or "lse" in given:
            self._check_written(given)
        if "query" in given and "out" not in given:
            first, last = _extent(self._out)
            if first <= given["query"].data_ptr() <= last:
                raise ValueError(f"query must not lie in {_OWN_OUT}: clone it")
        if seq_lens.is_cpu:
            self._check_lens(tables, seq_lens.tolist(), given.get("computed_lens"), max_seq_len)

    def _is_plainly_right(self, name: str, tensor: Any, batch: int) -> bool:
        """Whether `_check_slowly` need not look."""
        dtype, extents = self._expected[name]
        return (
            is_torch(tensor)
            and tensor.dtype is dtype
            and tensor.device == self._device
            and (name == "block_tables" or tensor.shape == (batch, *extents))
            and tensor.layout is torch.strided
            and tensor.stride(-1) == 1
            and not tensor.requires_grad
            and not tensor.is_neg()
        )

    def _check_slowly(self, given: dict[str, Any]) -> None:
        device = self._device
        for name, tensor in given.items():
            _check_torch(name, tensor, written=name in _WRITTEN)
        for name, tensor in given.items():
            if tensor.ndim != len(self._expected[name][1]) + 1:
                raise ValueError(f"{name} must be {_DIMS[name]}, got {list(tensor.shape)}")
        for name, tensor in given.items():
            dtype = self._expected[name][0]
            if tensor.dtype != dtype:
                like = " like k_cache" if name in ("query", "out") else ""
                raise TypeError(
                    f"{name} must be {dtype_name(dtype)}{like}, got {dtype_name(tensor.dtype)}"
                )
        for name, tensor in given.items():
            if tensor.device != device:
                raise ValueError(f"{name} must be on {device} like k_cache, got {tensor.device}")
        batch, columns = given["block_tables"].shape
        if batch > self._max_batch or columns > self._max_blocks:
            raise ValueError(
                f"block_tables must be [{self._max_batch}, {self._max_blocks}] at most, "
                f"got [{batch}, {columns}]"
            )
        for name, tensor in given.items():
            extents = self._expected[name][1]
            if not _has_shape(tensor, batch, extents):
                shape = ", ".join("*" if n is None else str(n) for n in (batch, *extents))
                raise ValueError(f"{name} must be [{shape}], got {list(tensor.shape)}")
        for name, tensor in given.items():
            if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(
                    f"{name} must be contiguous in its last dimension, "
                    f"got strides {list(tensor.stride())}"
                )

    def _check_written(self, given: dict[str, Any]) -> None:
        # Not kept from call to call: a copy of a decoder has its memory elsewhere.
        own = {"k_cache": self._k_cache, "v_cache": self._v_cache}
        if "out" not in given:  # which may be the decoder's own
            own[_OWN_OUT] = self._out
        extents = {name: _extent(tensor) for name, tensor in (given | own).items()}
        for name in _WRITTEN:
            if name not in given:
                continue
            written = given[name]
            if _may_overlap_itself(written):
                raise ValueError(
                    f"{name} is written and must not overlap itself, got shape "
                    f"{list(written.shape)} with strides {list(written.stride())}"
                )
            first, last = extents[name]
            for other, (other_first, other_last) in extents.items():
                if other != name and first <= other_last and other_first <= last:
                    raise ValueError(
                        f"{name} is written and must not share memory with {other}, "
                        "got overlapping addresses"
                    )

    def _check_lens(
        self,
        block_tables: Tensor,
        lens: list[int],
        computed_lens: Tensor | None,
        max_seq_len: int | None,
    ) -> None:
        if not lens:
            return
        capacity = block_tables.shape[1] * self._block_size
        if min(lens) < 0 or max(lens) > capacity:
            b, got = next((b, n) for b, n in enumerate(lens) if not 0 <= n <= capacity)
            raise ValueError(
                f"seq_lens[{b}] must be in [0, {capacity}], what block_tables holds, got {got}"
            )
        if max_seq_len is not None and max(lens) > max_seq_len:
            b, got = next((b, n) for b, n in enumerate(lens) if n > max_seq_len)
            raise ValueError(f"seq_lens[{b}] must be at most {max_seq_len}, max_seq_len, got {got}")
        if computed_lens is not None:
            for b, (computed, n) in enumerate(zip(computed_lens.tolist(), lens, strict=True)):
                if not 0 <= computed <= n:
                    raise ValueError(
                        f"computed_lens[{b}] must be in [0, {n}], the request's length, "
                        f"got {computed}"
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
        exists = torch.lt(self._block_starts, seq_lens[:, None], out=self._exists[:batch])
        every = torch.where(
            exists, self._every_number, self._no_block, out=self._all_blocks[:batch]
        )
        return self._for_every_head(every)

    def _for_every_head(self, blocks: Tensor) -> Tensor:
        return blocks[:, None].expand(-1, self._k_cache.shape[2], -1)

    def _workspace(self, num_bytes: int) -> Tensor | None:
        if num_bytes == 0:
            return None
        workspace: Tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        return workspace


def _check_torch(name: str, tensor: Any, *, written: bool = False) -> None:
    check_tensor(name, tensor)
    if not is_torch(tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(tensor).__name__}")
    argument(name, tensor, written=written)


def _check_caches(k_cache: Any, v_cache: Any) -> None:
    caches = (("k_cache", k_cache), ("v_cache", v_cache))
    for name, cache in caches:
        _check_torch(name, cache)
    for name, cache in caches:
        if cache.ndim != len(_CACHE_DIMS):
            raise ValueError(f"{name} must be [{', '.join(_CACHE_DIMS)}], got {list(cache.shape)}")
    if k_cache.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"k_cache must be float16, bfloat16 or float32, got {dtype_name(k_cache.dtype)}"
        )
    if v_cache.dtype != k_cache.dtype:
        expected, got = dtype_name(k_cache.dtype), dtype_name(v_cache.dtype)
        raise TypeError(f"v_cache must be {expected} like k_cache, got {got}")
    if v_cache.device != k_cache.device:
        raise ValueError(f"v_cache must be on {k_cache.device} like k_cache, got {v_cache.device}")
    if k_cache.is_meta:
        raise ValueError("k_cache must have memory, got device meta")
    for dim, size in zip(_CACHE_DIMS[1:], k_cache.shape[1:], strict=True):
        if size < 1:
            raise ValueError(f"k_cache must have {dim} >= 1, got {list(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache must be {list(k_cache.shape)}, got {list(v_cache.shape)}")


def _at_least(least: int, name: str, value: Any) -> int:
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _checked_scale(scale: Any) -> float:
    # torch would make a number of a tensor by waiting for its device.
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    number = optional_number("scale", scale)
    assert number is not None
    if not abs(number) <= _MAX_SCALE:
        raise ValueError(f"scale must be finite in float32, got {number:g}")
    return number


def _has_shape(tensor: Tensor, batch: int, extents: tuple[int | None, ...]) -> bool:
    shape = tensor.shape
    return (
        len(shape) == len(extents) + 1
        and shape[0] == batch
        and all(n is None or n == got for n, got in zip(extents, shape[1:], strict=True))
    )


def _may_overlap_itself(tensor: Tensor) -> bool:
    """As the operators ask: whether a dimension does not step over all that smaller ones reach."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address of the first and of the last byte of a tensor; 1 and 0 where it is empty."""
    if not tensor.numel():
        return 1, 0
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + (steps + 1) * tensor.element_size() - 1

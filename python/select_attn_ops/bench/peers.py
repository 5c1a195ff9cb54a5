"""Other libraries as alternatives: what ``scripts/build_peers.sh`` builds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import runtime
from .alternatives import OtherWorkError, Prepare, SelectionProblem, UnavailableError


class _Ktransformers:
    """The block selection of ktransformers, for one problem.

    It has an own copy of the metadata, float16 whatever ours is and as ktransformers lays it out,
    and the mean query, which is not made anew in each call: both are to its advantage. Not to it is
    that its threads are started anew in each call, some tenths of a millisecond.
    """

    # Of a table, a selector has vectors within vectors, 0.3 KiB per entry for 8 heads.
    _MOST_ENTRIES = 1 << 18

    def __init__(self, library: ctypes.CDLL, p: SelectionProblem) -> None:
        num_metadata_blocks, rows, num_heads, head_dim = p.maxblocks.shape
        self._library, self._selector = library, None
        self._batch = len(p.tables)
        mean = p.query.view(self._batch, num_heads, -1, head_dim).float().mean(2)
        self._query = mean.half().contiguous()
        self._tables = (p.tables[..., None] * rows + torch.arange(rows)).int().flatten(1)
        if p.rows is None:
            lens = torch.full((self._batch,), p.longest)
        else:
            lens = p.rows[2].bincount(minlength=self._batch)
        self._lens = lens.int()
        forced = 0 if p.forced is None else int(p.forced.sum(-1).min())
        self._first, self._last = min(forced, 1), max(forced - 1, 0)
        self._k = p.k - forced
        self.selected = torch.empty(self._batch, num_heads, p.k, dtype=torch.int32)
        """The blocks of the last call, as places in the pool of rows."""
        if self._k < 1 or int(self._lens.min()) <= p.k:
            raise OtherWorkError("it is not asked for a choice")
        if self._tables.numel() > self._MOST_ENTRIES:
            raise UnavailableError("its tables would take too much memory")
        self._selector = library.ktransformers_create(
            *self._tables.shape,
            num_heads,
            head_dim,
            num_metadata_blocks * rows,
            runtime.get_num_threads(),
        )
        pool = (ctypes.c_uint16 * (2 * p.maxblocks.numel())).from_address(
            library.ktransformers_anchors(self._selector)
        )
        anchors = torch.frombuffer(pool, dtype=torch.float16)
        anchors = anchors.view(num_metadata_blocks, rows, 2, num_heads, head_dim)
        anchors[:, :, 0] = p.maxblocks
        anchors[:, :, 1] = p.minblocks

    def __call__(self) -> torch.Tensor:
        self._library.ktransformers_select(
            self._selector,
            self._query.data_ptr(),
            self._tables.data_ptr(),
            self._lens.data_ptr(),
            self._batch,
            self._tables.shape[1],
            self._first,
            self._last,
            self._k,
            self.selected.data_ptr(),
        )
        return self.selected

    def __del__(self) -> None:
        if self._selector is not None:
            self._library.ktransformers_destroy(self._selector)


def _ktransformers(file: Path) -> Prepare:
    try:
        library = ctypes.CDLL(str(file.resolve()))
    except OSError as error:
        raise ValueError(f"{file} does not load: {error}") from error
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    for name, result, arguments in (
        ("create", pointer, [integer] * 6),
        ("destroy", None, [pointer]),
        ("anchors", pointer, [pointer]),
        ("select", None, [*[pointer] * 4, *[integer] * 5, pointer]),
    ):
        function = getattr(library, f"ktransformers_{name}")
        function.restype, function.argtypes = result, arguments

    def prepare(problems: Sequence[Any]) -> list[Callable[[], object]]:
        if not isinstance(problems[0], SelectionProblem):
            raise OtherWorkError("only its selection is built")
        return [_Ktransformers(library, problem) for problem in problems]

    return prepare


_PEERS: dict[str, Callable[[Path], Prepare]] = {"ktransformers": _ktransformers}


def load(folder: Path) -> dict[str, Prepare]:
    """The peers built in a folder, by name; a ValueError where there is none."""
    found = {name: folder / f"{name}.so" for name in _PEERS}
    peers = {name: _PEERS[name](file) for name, file in found.items() if file.exists()}
    if not peers:
        raise ValueError(f"no peer in {folder}: scripts/build_peers.sh builds them")
    return peers

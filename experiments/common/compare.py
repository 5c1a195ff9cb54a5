"""Comparison of what an operator wrote with its reference."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from .layouts import clone_with_storage, whole_storage

if TYPE_CHECKING:
    from ref_paged_select_attention import AttentionReference
    from ref_quest_block_select_paged import SelectionReference

# Order keys of scores that are no finite number: beyond every sum of products of float32 values.
_NAN_KEY, _INFINITY_KEY = 1e300, 1e200


def same_values(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return where two tensors agree, taking all NaN as equal and -0 as +0."""
    if not actual.is_floating_point():
        return actual == expected
    return (actual == expected) | (actual.isnan() & expected.isnan())


def assert_written(
    name: str, view: torch.Tensor, before: torch.Tensor, expected: torch.Tensor
) -> None:
    """Check that a call left ``expected`` in ``view`` and every other byte of its storage alone.

    Parameters
    ----------
    name : str
        What the message calls the output.
    view : torch.Tensor
        The output, after the call.
    before : torch.Tensor
        ``common.layouts.clone_with_storage(view)`` from before the call.
    expected : torch.Tensor
        Values of the whole view.
    """
    after = view.cpu()
    wrong = ~same_values(after, expected.cpu())
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ, first at {at}: "
            f"expected {expected[at].item()}, got {after[at].item()}"
        )
    outside = clone_with_storage(before)
    outside.copy_(view)
    same = whole_storage(outside).view(torch.uint8) == whole_storage(view).view(torch.uint8)
    assert bool(same.all()), f"{name}: bytes outside the view were written"


def _order_keys(scores: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest place in the order that a computed score may take."""
    keys = np.where(np.isnan(scores), _NAN_KEY, np.clip(scores, -_INFINITY_KEY, _INFINITY_KEY))
    return np.maximum(keys - errors, -_INFINITY_KEY), np.minimum(keys + errors, _NAN_KEY)


def _check_row(
    row: np.ndarray, forced: list[int], scores: np.ndarray, errors: np.ndarray
) -> str | None:
    """Return what is wrong with the selection of one KV head, or None."""
    total, k = len(scores), len(row)
    listed = min(k, total)
    blocks = row[:listed]
    if (row[listed:] != -1).any():
        return f"{total} blocks exist, so slots from {listed} on must hold -1"
    if (blocks < 0).any() or (blocks >= total).any():
        return f"only blocks 0..{total - 1} exist, and {listed} of them must be listed"
    if len(np.unique(blocks)) != listed:
        return "a block is listed twice"
    prefix = forced[:k]
    if blocks[: len(prefix)].tolist() != prefix:
        return f"must start with window and sink {prefix}"

    chosen = blocks[len(prefix) :]
    rest = np.setdiff1d(np.arange(total), np.concatenate([blocks, forced]).astype(np.int64))
    # Left out blocks stand behind the chosen ones, in the order of the reference.
    rest = rest[np.argsort(-_order_keys(scores, np.zeros_like(scores))[0][rest], kind="stable")]
    order = np.concatenate([chosen, rest]).astype(np.int64)
    if not len(chosen) or len(order) < 2:
        return None
    low, high = _order_keys(scores[order], errors[order])
    best_behind = np.maximum.accumulate(low[::-1])[::-1][1:]
    too_early = np.flatnonzero(best_behind > high[:-1])
    too_early = too_early[too_early < len(chosen)]
    if len(too_early):
        i = int(too_early[0])
        other = order[i + 1 + int(np.argmax(low[i + 1 :]))]
        return (
            f"block {order[i]} (score {scores[order[i]]!r}, error {errors[order[i]]!r}) stands "
            f"before block {other} (score {scores[other]!r}, error {errors[other]!r})"
        )
    exact = np.flatnonzero(errors[order] == 0)
    exact = exact[: np.searchsorted(exact, len(chosen)) + 1]
    for i, j in pairwise(exact):
        if low[i] == low[j] and order[i] > order[j]:
            return (
                f"blocks {order[i]} and {order[j]} both score {scores[order[i]]!r}: "
                "the smaller number goes first"
            )
    return None


def assert_selection_matches(
    actual: torch.Tensor, reference: SelectionReference, *, error_scale: float = 1.0
) -> None:
    """Check a selection by the scores it reached.

    Float32 sums differ in their last bits with the order of summation, so two right answers may
    differ where scores nearly tie. A block may stand before another unless its score is lower by
    more than both may be off; where the reference says that scores are exact, equal ones must go by
    increasing number. Window, sink, padding, NaN and infinities leave no choice.

    Parameters
    ----------
    actual : torch.Tensor
        ``[batch, num_kv_heads, k]``, int32.
    reference : SelectionReference
        From `quest_block_select_paged_ref`.
    error_scale : float
        Multiple of the reference's error bounds to allow, for a backend that documents more.
    """
    assert actual.dtype == torch.int32, f"indices are {actual.dtype}"
    assert actual.shape == reference.indices.shape, (
        f"indices have shape {list(actual.shape)}, expected {list(reference.indices.shape)}"
    )
    selected, expected = actual.cpu().numpy(), reference.indices.cpu().numpy()
    # Most rows are those of the reference to the last index, which needs no closer look.
    for b, n in np.argwhere((selected != expected).any(-1)).tolist():
        problem = _check_row(
            selected[b, n],
            reference.forced[b],
            reference.scores[b][n].numpy(),
            reference.errors[b][n].numpy() * error_scale,
        )
        if problem:
            raise AssertionError(
                f"request {b}, KV head {n}: {problem}\n"
                f"selected {selected[b, n].tolist()}\nexpected {expected[b, n].tolist()}"
            )


def assert_indices_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check a selection index by index, for data whose scores are exact."""
    wrong = (actual.cpu() != expected.cpu()).any(-1)
    if wrong.any():
        b, n = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} rows differ, first at request {b}, KV head "
            f"{n}:\nselected {actual[b, n].tolist()}\nexpected {expected[b, n].tolist()}"
        )


def assert_attention_matches(
    out: torch.Tensor, lse: torch.Tensor | None, reference: AttentionReference
) -> None:
    """Check an attention's results against the reference and its error bounds.

    Parameters
    ----------
    out, lse : torch.Tensor
        Results of the operator.
    reference : AttentionReference
        From `ref_paged_select_attention`.
    """
    found = [("out", out, reference.out, reference.out_error)]
    if lse is not None:
        found.append(("lse", lse, reference.lse, reference.lse_error))
    for name, actual, expected, error in found:
        computed = actual.cpu().double()
        near = (computed - expected).abs() <= error
        # Whether a value's infinity comes out as one or as NaN depends on what vanishes beside it.
        special = ~computed.isfinite() if name == "out" else same_values(computed, expected)
        is_right = torch.where(expected.isfinite(), near, special)
        wrong = ~(is_right | error.isinf())
        if wrong.any():
            at = tuple(int(i) for i in wrong.nonzero()[0])
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} values are too far off, first at "
                f"{at}: expected {expected[at].item()} within {error[at].item()}, got "
                f"{computed[at].item()}"
            )

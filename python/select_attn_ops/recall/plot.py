"""The picture of a run: shares of the attention mass against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench.plot import pyplot
from .measures import MEASURES


def write_plot(path: Path, budgets: Sequence[int], shares: torch.Tensor, block_size: int) -> None:
    """Draw the means over layers and heads, and the span of the selection over them.

    Parameters
    ----------
    path : Path
        Where to; the ending says the format.
    budgets : sequence of int
        Blocks.
    shares : torch.Tensor
        ``[num_layers, len(budgets), len(MEASURES), num_kv_heads]``.
    block_size : int
        Tokens per block.
    """
    figure, axes = pyplot().subplots(figsize=(8, 5))
    tokens = [k * block_size for k in budgets]
    means = shares.mean((0, 3))
    for i, name in enumerate(MEASURES):
        style = "o--" if name == "recall" else "o-"
        label = "recall of the best blocks" if name == "recall" else f"mass, {name}"
        axes.plot(tokens, means[:, i].tolist(), style, label=label)
    selected = shares[:, :, 0].transpose(1, 2).flatten(0, 1)
    low, high = selected.amin(0).tolist(), selected.amax(0).tolist()
    axes.fill_between(tokens, low, high, alpha=0.15, label="selected, all layers and heads")
    axes.set(xlabel=f"budget in tokens, blocks of {block_size}", ylabel="share", ylim=(0, 1.02))
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)

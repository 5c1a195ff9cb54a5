"""The picture of the evaluation: accuracy, perplexity, attention mass and recall by budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measures
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

# Those of Okabe and Ito, which the colour-blind can tell apart.
_BLACK, _BLUE, _ORANGE, _GREEN, _GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#767676"
_STYLES = {
    "exact": ("exact scores", _BLACK, "--", "^"),
    "quest": ("Quest", _BLUE, "-", "o"),
    "recent": ("most recent", _ORANGE, "-.", "s"),
    "random": ("random", _GREY, ":", "v"),
}
_TASKS = {
    "passkey": "pass key",
    "pairs": "key-value pairs",
    "passage": "repeated passage",
    "letters": "repeated letters",
}


def _budget_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(shares)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * share:.3g}" for share in shares])
    axes.axvline(0.125, color="#DDDDDD", zorder=0)
    axes.grid(axis="y", color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)


def _accuracies(axes: Axes, evaluation: Any, task: str, size: int) -> None:
    for rule, (label, color, dash, marker) in _STYLES.items():
        rows = [
            r for r in evaluation.results if (r.task, r.block_size, r.rule) == (task, size, rule)
        ]
        shares = [r.k * r.block_size / r.num_tokens for r in rows]
        counts = [(sum(r.right), sum(r.count)) for r in rows]
        middle = np.array([100 * right / count for right, count in counts])
        ends = 100 * np.array([measures.wilson(*pair) for pair in counts])
        axes.plot(shares, middle, dash, color=color, marker=marker, label=label, clip_on=False)
        axes.fill_between(shares, ends[:, 0], ends[:, 1], color=color, alpha=0.15, linewidth=0)
    right, count = evaluation.dense_by_length[task][evaluation.num_tokens]
    axes.axhline(100 * right / count, color=_GREEN, linewidth=1.5, label="dense")
    axes.set_ylim(0, 102)
    axes.set_title(f"{_TASKS[task]}, blocks of {size}", loc="left", fontsize=10)
    axes.set_ylabel("answers right, %")


def _perplexities(axes: Axes, evaluation: Any, size: int) -> None:
    for rule, (_, color, dash, marker) in _STYLES.items():
        rows = [r for r in evaluation.perplexities if r["block_size"] == size and r["rule"] == rule]
        shares = [r["k"] * size / evaluation.num_tokens for r in rows]
        axes.plot(shares, [r["perplexity"] for r in rows], dash, color=color, marker=marker)
    for row in evaluation.perplexities:
        if row["rule"] == "dense":
            axes.axhline(row["perplexity"], color=_GREEN, linewidth=1.5)
    axes.set_title(f"held-out text, blocks of {size}", loc="left", fontsize=10)
    axes.set_ylabel("perplexity")


def _masses(axes: Axes, evaluation: Any, size: int, what: str, label: str) -> None:
    for rule, (_, color, dash, marker) in _STYLES.items():
        by_k: dict[int, list[float]] = {}
        for rows in evaluation.masses.values():
            for row in rows:
                if row["block_size"] == size and row["rule"] == rule:
                    by_k.setdefault(row["k"], []).append(float(np.mean(row[what])))
        shares = [k * size / evaluation.num_tokens for k in by_k]
        values = [float(np.mean(means)) for means in by_k.values()]
        axes.plot(shares, values, dash, color=color, marker=marker, clip_on=False)
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{label}, blocks of {size}", loc="left", fontsize=10)
    axes.set_ylabel(label)


def plot_accuracy(evaluation: Any, output: Path) -> None:
    """Draw all panels and write the picture.

    Parameters
    ----------
    evaluation : evaluate_accuracy.Evaluation
    output : Path
        Where the picture goes; the suffix says which format.
    """
    sizes = sorted({r.block_size for r in evaluation.results if r.rule != "dense"})
    tasks = list(evaluation.dense_by_length)
    rows = len(tasks) + 3
    figure = Figure(figsize=(5.2 * len(sizes), 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, len(sizes), squeeze=False)
    for column, size in enumerate(sizes):
        for row, task in enumerate(tasks):
            _accuracies(panels[row, column], evaluation, task, size)
        _perplexities(panels[-3, column], evaluation, size)
        _masses(panels[-2, column], evaluation, size, "held", "attention mass held")
        _masses(panels[-1, column], evaluation, size, "recall", "recall of the best blocks")
        shares = sorted({r.share for r in evaluation.results if r.rule != "dense"})
        for axes in panels[:, column]:
            _budget_axis(axes, shares)
        panels[-1, column].set_xlabel("budget, % of the blocks")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"{evaluation.num_tokens:,} tokens, a trained model of "
        f"{evaluation.parameters / 1e6:.1f} million parameters",
        fontsize=11,
    )
    figure.savefig(output, dpi=110)

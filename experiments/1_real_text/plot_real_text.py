"""The picture: where a decode step attends, what was selected and kept; what steps take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

# From Okabe and Ito's palette, told apart by every kind of colour vision; lines differ by marker
# and dash as well.
_BLUE, _ORANGE, _BLACK, _GREY = "#0072B2", "#D55E00", "#000000", "#8C8C8C"

_LEAST_MASS = 1e-6


class Budget(Protocol):
    """What the picture needs of one budget; masses are ``[num_steps, num_kv_heads]``."""

    k: int
    blocks: torch.Tensor
    selected: torch.Tensor
    best: torch.Tensor
    recent: torch.Tensor
    random: torch.Tensor
    read_share: float


class Step(Protocol):
    """What the picture needs of one way to make a step."""

    name: str
    k: int | None
    seconds: float
    error: float


def _percent(share: float, decimals: int = 0) -> str:
    return f"{100 * share:.{decimals}f} %"


def _typical(budget: Budget) -> tuple[int, int]:
    """Step and KV head nearest to the means of the table, so that the example is no lucky one."""
    distance = sum(
        (held - held.mean()).abs() for held in (budget.selected, budget.best, budget.recent)
    )
    return divmod(int(distance.argmin()), budget.selected.shape[1])


def _plot_blocks(
    axes: Axes, mass: torch.Tensor, seq_lens: torch.Tensor, block_size: int, budget: Budget
) -> None:
    step, head = _typical(budget)
    seq_len = int(seq_lens[step])
    num_blocks = -(-seq_len // block_size)
    row = mass[step, head, :num_blocks].cpu()
    listed = budget.blocks[step, head].cpu()
    selected = listed[listed >= 0].sort().values
    best = row.topk(min(budget.k, num_blocks)).indices
    missed = best[~torch.isin(best, selected)]
    axes.vlines(
        range(num_blocks), _LEAST_MASS, row, color=_GREY, linewidth=0.7, label="not selected"
    )
    axes.vlines(selected, _LEAST_MASS, row[selected], color=_BLUE, linewidth=1.6)
    axes.plot(
        selected,
        row[selected].clamp(min=_LEAST_MASS),
        "o",
        color=_BLUE,
        markersize=6,
        label=f"selected, hold {_percent(budget.selected[step, head])} of the mass",
        clip_on=False,
        zorder=3,
    )
    if len(missed):
        axes.plot(
            missed,
            row[missed],
            "D",
            markerfacecolor="none",
            markeredgecolor=_BLACK,
            markeredgewidth=1.2,
            markersize=6,
            label=f"missed of the best {budget.k}, which hold {_percent(budget.best[step, head])}",
        )
    axes.set_yscale("log")
    axes.set_ylim(_LEAST_MASS, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-num_blocks * 0.01, num_blocks * 1.01)
    axes.set_xlabel(f"KV block of the context, {block_size} tokens each (right: newest)")
    axes.set_ylabel("attention mass in the block")
    axes.set_title(
        f"One decode step at {seq_len:,} tokens, KV head {head}: "
        f"{len(selected)} of {num_blocks} blocks selected",
        loc="left",
        fontweight="bold",
        pad=44,
    )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.07),
        ncols=3,
        frameon=False,
        borderpad=0,
        borderaxespad=0.4,
    )
    for block, name, side in ((0, "sink", "left"), (num_blocks - 1, "window", "right")):
        if name == "sink" or seq_len % block_size:
            axes.text(
                block,
                1.01,
                name,
                transform=axes.get_xaxis_transform(),
                ha=side,
                va="bottom",
                color=_BLUE,
            )


def _plot_budgets(axes: Axes, budgets: Sequence[Budget]) -> None:
    ks = [budget.k for budget in budgets]
    lines = (
        ("best", "best possible", _BLACK, "--", "^"),
        ("selected", "selected", _BLUE, "-", "o"),
        ("recent", "most recent", _ORANGE, "-.", "s"),
        ("random", "random", _GREY, ":", "v"),
    )
    label_at = 1.06
    for field, label, color, dash, marker in lines:
        shares = [float(getattr(budget, field).mean()) for budget in budgets]
        axes.plot(
            ks, shares, dash, color=color, marker=marker, linewidth=2, markersize=7, clip_on=False
        )
        # Lines that meet, as in a short context, keep their labels apart.
        label_at = min(shares[-1], label_at - 0.06)
        axes.annotate(
            label,
            (ks[-1], label_at),
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
        )
        if field == "selected":
            for k, share in zip(ks, shares, strict=True):
                axes.annotate(
                    _percent(share),
                    (k, share),
                    xytext=(0, -17),
                    textcoords="offset points",
                    ha="center",
                    color=color,
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [f"{b.k} blocks\n{_percent(b.read_share, 1)} read" for b in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ks[0] / 1.15, ks[-1] * 1.5)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_xlabel("budget k, and bytes read (metadata and k blocks) of all K and V")
    axes.set_ylabel("attention mass held")
    steps, heads = budgets[0].selected.shape
    axes.set_title(
        f"Share of the exact attention mass, mean of {steps} decode steps and {heads} KV heads",
        loc="left",
        fontweight="bold",
    )


def _plot_times(axes: Axes, steps: Sequence[Step]) -> None:
    best_dense = min(step.seconds for step in steps if step.k is None)
    times = [step.seconds * 1e3 for step in steps]
    for row, (time, step) in enumerate(zip(times, steps, strict=True)):
        color = _BLACK if step.k is None else _BLUE
        gain = "" if step.k is None else f", {best_dense / step.seconds:.0f} x"
        axes.plot(time, row, "o", color=color, markersize=8)
        axes.annotate(
            f"{time:.{1 if time < 100 else 0}f} ms{gain}",
            (time, row),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set_yticks(range(len(steps)), [step.name for step in steps])
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.5, max(times) * 6)
    axes.grid(axis="y", color="#DDDDDD")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ms; x: times faster than the faster of the dense steps")
    axes.set_title("A whole decode step: update, select, attend", loc="left", fontweight="bold")


def _plot_errors(axes: Axes, steps: Sequence[Step]) -> None:
    sparse = [step for step in steps if step.k is not None]
    ks = [step.k for step in sparse]
    errors = [step.error for step in sparse]
    axes.plot(ks, errors, "-o", color=_BLUE, linewidth=2, markersize=7, clip_on=False)
    for k, error in zip(ks, errors, strict=True):
        axes.annotate(
            _percent(error, 1),
            (k, error),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_BLUE,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlim(ks[0] / 1.2, ks[-1] * 1.2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, max(*errors, 1e-3) * 1.25)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_xlabel("budget k")
    axes.set_title("Error of its output, relative to its length", loc="left", fontweight="bold")


def plot_real_text(
    mass: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    budgets: Sequence[Budget],
    steps: Sequence[Step],
    output: Path,
) -> None:
    """Draw all panels and write the picture.

    Parameters
    ----------
    mass : torch.Tensor
        ``[num_steps, num_kv_heads, num_blocks]``, exact share of every KV block.
    seq_lens : torch.Tensor
        ``[num_steps]``, tokens in the cache at each step.
    block_size : int
        Tokens per KV block.
    budgets : sequence of Budget
        By rising ``k``; the first panel shows the second smallest.
    steps : sequence of Step
        Dense ones, then sparse ones.
    output : Path
        Where the picture goes; the suffix says which format.
    """
    figure = Figure(figsize=(11, 12), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, hspace=0.06)
    panels = figure.subplot_mosaic([["blocks"] * 2, ["budgets"] * 2, ["times", "errors"]])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    _plot_blocks(panels["blocks"], mass, seq_lens, block_size, budgets[min(1, len(budgets) - 1)])
    _plot_budgets(panels["budgets"], budgets)
    _plot_times(panels["times"], steps)
    _plot_errors(panels["errors"], steps)
    figure.savefig(output, dpi=120)

"""The picture of summaries: bytes per block against attention mass and right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_KINDS = {
    "minmax": ("bounds (Quest)", _BLUE, "o"),
    "mean": ("mean", _ORANGE, "s"),
    "deviation": ("mean and deviations", _GREEN, "^"),
}


def _points(
    axes: Axes, rows: Sequence[Any], value: Callable[[Any], float], limit: float, label: str
) -> None:
    for kind, (name, color, marker) in _KINDS.items():
        chosen = sorted((r for r in rows if r.summary["kind"] == kind), key=lambda r: r.nbytes)
        axes.plot(
            [r.nbytes for r in chosen],
            [value(r) for r in chosen],
            marker,
            color=color,
            alpha=0.35,
            markersize=5,
            markeredgewidth=0,
        )
        edge: list[Any] = []
        for row in sorted(chosen, key=lambda r: (r.nbytes, -value(r))):
            if not edge or value(row) > value(edge[-1]):
                edge.append(row)
        axes.step(
            [r.nbytes for r in edge],
            [value(r) for r in edge],
            color=color,
            marker=marker,
            where="post",
            label=name,
        )
    quest = next(r for r in rows if r.name == "minmax 16b query")
    axes.annotate(
        "Quest",
        (quest.nbytes, value(quest)),
        xytext=(32, -6),
        textcoords="offset points",
        ha="left",
        va="center",
        color=_BLUE,
        arrowprops={"arrowstyle": "-", "color": _BLUE},
    )
    axes.axhline(limit, color="#000000", linestyle="--", linewidth=1)
    axes.text(
        1, limit, "exact scores ", transform=axes.get_yaxis_transform(), ha="right", va="bottom"
    )
    axes.set_xscale("log", base=2)
    ticks = sorted({2**i for i in range(3, 14) if rows[0].nbytes / 8 <= 2**i <= rows[0].nbytes * 9})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(label)
    axes.set_xlabel("bytes per block and KV head")


def plot_summaries(found: dict[str, tuple[list[Any], dict[str, Any]]], output: Path) -> None:
    """Draw all panels and write the picture; ``found`` is what ``compare_summaries`` returns."""
    count = len(found) + ("model" in found)
    figure = Figure(figsize=(9, 3.9 * count), layout="constrained")
    panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    first = panels[0]
    for name, (rows, limits) in found.items():
        where = "Trained model" if name == "model" else "Features of 1_real_text"
        about = f"{limits['k']} blocks of {limits['block_size']}, {limits['tokens']:,} tokens"
        axes = panels.pop(0)
        _points(axes, rows, lambda r: r.mass, limits["exact_mass"], "attention mass held")
        axes.set_title(f"{where}: {about}", loc="left")
        if name == "model":
            axes = panels.pop(0)
            right = 100 * limits["exact"]
            _points(axes, rows, lambda r: 100 * r.right / r.count, right, "answers right, %")
            axes.set_title(f"{where}: key-value pairs", loc="left")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(output, dpi=110)

"""The picture of a run: time and share of the ceiling against the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import tokens_text
from .runner import Result


def pyplot() -> Any:
    """matplotlib, without a display, or an ImportError that says what needs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib: {error}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before what it shows is measured."""
    pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    endings = ["." + ending for ending in sorted(FigureCanvasBase.get_supported_filetypes())]
    if path.suffix.lower() not in endings:
        raise ValueError(f"--plot must end in one of {', '.join(endings)}, got {path}")


def write_plot(path: Path, points: Sequence[tuple[int, Result]], title: str) -> None:
    """Draw results of requests of increasing length, a line for each operator.

    Parameters
    ----------
    path : Path
        Where to; the ending says the format.
    points : sequence of (int, Result)
        Results with the tokens of their request.
    title : str
        What the figures depend on.
    """
    figure, (above, below) = pyplot().subplots(2, 1, sharex=True, figsize=(8, 8))
    lines: dict[str, list[tuple[int, Result]]] = {}
    for count, result in points:
        name = f"{result.operator}, {result.dtype}, {result.threads} threads"
        lines.setdefault(name, []).append((count, result))
    for name, line in lines.items():
        tokens = [count for count, _ in line]
        drawn = above.plot(tokens, [r.seconds.median * 1e3 for _, r in line], "o-", label=name)
        color = drawn[0].get_color()
        below.plot(tokens, [r.share.median for _, r in line], "o-", color=color)
        low, high = [r.share.low for _, r in line], [r.share.high for _, r in line]
        below.fill_between(tokens, low, high, color=color, alpha=0.2)
    above.set(xscale="log", yscale="log", ylabel="milliseconds")
    above.set_title(title, fontsize="small", wrap=True)
    above.legend()
    below.set(xlabel="tokens of the request", ylabel="share of the read ceiling")
    below.set_ylim(0, max(1.1, *(r.share.high for _, r in points)))
    below.axhline(1, color="gray", linewidth=1)
    ticks = sorted({count for count, _ in points})
    below.set_xticks(ticks, [tokens_text(count) for count in ticks])
    below.minorticks_off()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)

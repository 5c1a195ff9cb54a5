"""The command line: how much of exact attention a budget keeps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bench.plot import check_plot
from . import loading, model
from .measures import MEASURES, Layer, measure
from .plot import write_plot

_WORST = 5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m select_attn_ops recall",
        description="Say how much of exact attention the selected blocks hold, by budget: on "
        "your own keys and queries (after the rotary embedding), or on a model and a text.",
    )
    add = parser.add_argument
    add("--keys", type=Path, metavar="FILE", help="[layers, num_kv_heads, tokens, head_dim]")
    add("--queries", type=Path, metavar="FILE", help="[layers, num_heads, steps, head_dim]")
    add("--positions", type=Path, metavar="FILE", help="[steps] (default: the last tokens)")
    add("--model", type=Path, metavar="DIR", help="a model of transformers, and its tokenizer")
    add("--text", type=Path, metavar="FILE", help="what the model reads")
    add("--tokens", type=int, default=8192, help="of the text, at most (default: 8192)")
    add("--steps", type=int, default=64, help="last tokens of the text (default: 64)")
    add("--block-size", type=int, default=16, help="tokens per block (default: 16)")
    add(
        "--budgets",
        type=int,
        nargs="+",
        default=[128, 256, 512, 1024, 2048],
        metavar="TOKENS",
        help="tokens per step (default: 128 256 512 1024 2048)",
    )
    add("--recent-blocks", type=int, default=1, help="newest full blocks (default: 1)")
    add("--mass", type=float, default=0.9, help="share to find a budget for (default: 0.9)")
    add("--seed", type=int, default=0, help="of the random blocks (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="draw them")
    return parser


def _check(options: argparse.Namespace) -> None:
    tensors, texts = (options.keys, options.queries), (options.model, options.text)
    if not (all(tensors) and not any(texts)) and not (all(texts) and not any(tensors)):
        raise ValueError("expected --keys and --queries, or --model and --text")
    if options.positions and options.model:
        raise ValueError("--positions goes with --keys and --queries only")
    for name, least in (("tokens", 1), ("steps", 1), ("block-size", 1), ("recent-blocks", 0)):
        value = getattr(options, name.replace("-", "_"))
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if min(options.budgets) < options.block_size:
        raise ValueError(
            f"--budgets must be at least a block of {options.block_size}, "
            f"got {min(options.budgets)}"
        )
    if not 0 < options.mass <= 1:
        raise ValueError(f"--mass must be in (0, 1], got {options.mass}")
    # What is missing only when the figures are there should not come as a surprise then.
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ValueError(f"--{name} must be in a folder that exists, got {path}")
        if path and path.is_dir():
            raise ValueError(f"--{name} must be no folder, got {path}")
    if options.plot:
        check_plot(options.plot)


def table(
    names: Sequence[int], budgets: Sequence[int], shares: torch.Tensor, block_size: int, mass: float
) -> str:
    """The figures in words.

    Parameters
    ----------
    names : sequence of int
        Numbers of the layers.
    budgets : sequence of int
        Blocks.
    shares : torch.Tensor
        ``[num_layers, len(budgets), len(MEASURES), num_kv_heads]``.
    block_size : int
        Tokens per block.
    mass : float
        The share to find a budget for.
    """
    means, by_head = shares.mean((0, 3)), shares[:, :, 0]
    lines = [
        "Share of the exact attention mass, mean over steps, layers and KV heads; recall is the",
        "share of the best blocks that were selected.",
        "",
        " tokens  blocks  selected  best possible  most recent  random  recall",
    ]
    for k, (selected, best, recent, lot, recall) in zip(budgets, means.tolist(), strict=True):
        lines.append(
            f"{k * block_size:7}{k:8}{selected:10.3f}{best:15.3f}{recent:13.3f}{lot:8.3f}"
            f"{recall:8.3f}"
        )
    heading = "".join(f"{k * block_size:8}" for k in budgets)
    lines += ["", f"Selected mass per layer, mean of its KV heads, by tokens\n  layer{heading}"]
    for name, row in zip(names, by_head.mean(-1).tolist(), strict=True):
        lines.append(f"{name:7}" + "".join(f"{share:8.3f}" for share in row))
    lines += ["", f"Worst heads\n  layer  head{heading}"]
    num_kv_heads = shares.shape[3]
    for i in by_head[:, -1].flatten().argsort(stable=True)[:_WORST].tolist():
        layer, head = divmod(i, num_kv_heads)
        row = by_head[layer, :, head].tolist()
        lines.append(f"{names[layer]:7}{head:6}" + "".join(f"{share:8.3f}" for share in row))
    return "\n".join([*lines, "", hint(budgets, means[:, 0].tolist(), block_size, mass)])


def hint(budgets: Sequence[int], selected: Sequence[float], block_size: int, mass: float) -> str:
    """The smallest of the budgets whose selection holds `mass`, as a sentence."""
    for k, share in zip(budgets, selected, strict=True):
        if share >= mass:
            return (
                f"The smallest of these budgets that holds {mass:g} of the mass on average: "
                f"{k * block_size} tokens ({k} blocks)."
            )
    return f"None of these budgets holds {mass:g} of the mass on average: try larger --budgets."


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    options = _parser().parse_args(arguments)
    _check(options)
    block_size = options.block_size
    budgets = sorted({tokens // block_size for tokens in options.budgets})
    generator = torch.Generator().manual_seed(options.seed)
    names: list[int] = []
    rows: list[torch.Tensor] = []

    def see(name: int, layer: Layer) -> None:
        print(f"layer {name}", file=sys.stderr, flush=True)
        names.append(name)
        rows.append(measure(layer, block_size, budgets, options.recent_blocks, generator))

    if options.keys:
        files = {"keys": options.keys, "queries": options.queries, "positions": options.positions}
        tensors = {name: path and loading.load(path, name) for name, path in files.items()}
        for name, layer in enumerate(loading.layers(**tensors)):
            see(name, layer)
    else:
        model.read(options.model, options.text, options.tokens, options.steps, see)
    if not rows:
        raise ValueError("expected a layer without a sliding window, got none")
    shares = torch.stack(rows)
    print(table(names, budgets, shares, block_size, options.mass))
    if options.json:
        figures: dict[str, Any] = {"block_size": block_size, "blocks": budgets, "layers": names}
        for i, measured in enumerate(MEASURES):
            figures[measured] = shares[:, :, i].tolist()  # [layer][budget][KV head]
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        write_plot(options.plot, budgets, shares, block_size)
    return 0

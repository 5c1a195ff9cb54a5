"""Other summaries of blocks than their bounds: bytes against attention mass and right answers.

    python experiments/6_accuracy/compare_summaries.py

Plain PyTorch; nothing here is an operator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: F401  (makes every experiment's modules importable)
import measures
import numpy as np
import torch
from evaluate_accuracy import (
    MODEL_FOLDER,
    SEEDS,
    are_right,
    budget,
    continued,
    load_model,
    prefill,
)
from gen_data_retrieval import default_text, gen_data_questions, read_tokens
from measures import Summary
from simulated_attention import Rule, simulate

PARTS = (1, 2, 4, 8)


@dataclass
class Row:
    """One summary: bytes per block and KV head, mass held, and right answers (None: no model)."""

    summary: dict[str, object]
    name: str
    nbytes: int
    mass: float
    right: int | None = None
    count: int | None = None


def all_summaries(with_positions: bool) -> list[Summary]:
    """Kinds, sub-blocks and ways to combine them; then bits, groups and positions of some.

    Each list varies what it is about, and little else: the product would be thousands.
    """
    shapes = [
        (parts, way) for parts in PARTS for way in ("max", "lse") if parts > 1 or way == "max"
    ]
    kinds = [("minmax", 1.0), ("mean", 1.0), *(("deviation", float(c)) for c in range(1, 5))]
    found = [Summary(kind, parts, way, 16, c=c) for kind, c in kinds for parts, way in shapes]
    for kind, c in (("minmax", 1.0), ("mean", 1.0), ("deviation", 1.0)):
        for bits in (8, 4):
            found += [Summary(kind, parts, way, bits, c=c) for parts, way in shapes]
    for kind in ("minmax", "mean"):
        for group in ("max", "mean", "share"):
            for parts, way in ((1, "max"), (2, "lse"), (4, "lse"), (4, "max"), (8, "lse")):
                found += [Summary(kind, parts, way, bits, group=group) for bits in (16, 4)]
    if with_positions:
        for keys in ("plain", "middle"):
            for parts, way in ((1, "max"), (2, "lse"), (4, "lse"), (8, "lse")):
                found += [Summary("mean", parts, way, bits, keys) for bits in (16, 4)]
        found += [Summary("minmax", parts, "max", 16, "plain") for parts in PARTS]
    return list(dict.fromkeys(found))


def on_model(
    options: argparse.Namespace, summaries: Sequence[Summary], progress: Callable[[str], None]
) -> tuple[list[Row], dict[str, object]]:
    """Mass and answers in the trained model."""
    model, tokenizer = load_model(options.model)
    simulation = simulate(model)
    text = read_tokens(tokenizer, options.text, held_out=True)
    size, k = options.block_size, budget(options.share, options.tokens, options.block_size)
    rules = [Rule("dense"), Rule("exact", k, size)]
    rules += [Rule("summary", k, size, summary) for summary in summaries]
    right, mass = np.zeros(len(rules), int), np.zeros(len(rules))
    count = contexts = 0
    for seed in options.seeds:
        data = gen_data_questions(
            text, "pairs", options.contexts, options.questions, options.tokens, seed
        )
        steps = slice(-data.answer_tokens - 1, -1)
        for number, (context, questions) in enumerate(
            zip(data.contexts, data.questions, strict=True)
        ):
            progress(f"model, seed {seed}, text {number + 1} of {len(data.contexts)}")
            cache = prefill(model, simulation, context)
            simulation.keep = True
            logits = continued(model, simulation, cache, questions, rules[0])
            simulation.keep = False
            right[0] += int(are_right(logits, questions, data.answer_tokens).sum())
            seen, generator = list(simulation.seen), torch.Generator()
            count, contexts = count + len(questions), contexts + 1
            exact = [measures.block_masses(q, key, size) for q, key in seen]
            for i, rule in enumerate(rules[1:], 1):
                for (query, key), masses in zip(seen, exact, strict=True):
                    if rule.kind == "exact":
                        scores = masses.mean(2)
                    else:
                        scores = rule.scores(query, key, simulation.theta, generator)
                    ranked = measures.ranks(scores, key.shape[2], size)
                    chosen = measures.top_blocks(ranked, k)
                    held = measures.held(masses, chosen)[..., steps].mean()
                    mass[i] += float(held) / len(seen)
                logits = continued(model, simulation, cache, questions, rule)
                right[i] += int(are_right(logits, questions, data.answer_tokens).sum())
    head_dim = int(model.config.head_dim)
    rows = [
        Row(asdict(s), s.name, s.nbytes(head_dim), float(m / contexts), int(r), count)
        for s, m, r in zip(summaries, mass[2:], right[2:], strict=True)
    ]
    limits = {
        "dense": int(right[0]) / count,
        "exact": int(right[1]) / count,
        "exact_mass": float(mass[1] / contexts),
        "block_size": size,
        "k": k,
        "tokens": options.tokens,
        "block_bytes": 2 * size * head_dim * 2,
    }
    return rows, limits


def on_features(
    options: argparse.Namespace, summaries: Sequence[Summary], progress: Callable[[str], None]
) -> tuple[list[Row], dict[str, object]]:
    """Mass in the features of ``1_real_text``, which have no positions and no answers."""
    import attention_mass
    from gen_data_real_text import BLOCK_SIZE, HEAD_DIM, gen_data_real_text

    data = gen_data_real_text(
        options.text,
        options.feature_tokens,
        options.feature_steps,
        0,
        torch.device("cpu"),
        progress,
    )
    mass, _ = attention_mass.exact_attention(data, progress)
    full = data.metadata_seq_lens.long() // BLOCK_SIZE
    num_kv_heads, num_blocks = mass.shape[1:]
    k = options.feature_k
    block = torch.arange(num_blocks)
    seen = -(-data.seq_lens.long() // BLOCK_SIZE)
    held = np.zeros(len(summaries))
    grouped = data.query.float().unflatten(1, (num_kv_heads, -1))
    for head in range(num_kv_heads):
        progress(f"features, KV head {head + 1} of {num_kv_heads}")
        blocks = data.k_cache[data.block_tables[0], :, head].float()
        query = grouped[:, head].transpose(0, 1)
        for i, summary in enumerate(summaries):
            scores = measures.scores_of_blocks(query, blocks, full, summary)
            scores = scores.masked_fill(block == 0, 1e30).masked_fill(block >= full[:, None], 2e30)
            scores = scores.masked_fill(block >= seen[:, None], -torch.inf)
            held[i] += float(mass[:, head].gather(-1, scores.topk(k).indices).sum(-1).mean())
    rows = [
        Row(asdict(s), s.name, s.nbytes(HEAD_DIM), float(h / num_kv_heads))
        for s, h in zip(summaries, held, strict=True)
    ]
    limits: dict[str, object] = {
        "exact_mass": float(mass.topk(k).values.sum(-1).mean()),
        "block_size": BLOCK_SIZE,
        "k": k,
        "tokens": options.feature_tokens,
        "block_bytes": 2 * BLOCK_SIZE * HEAD_DIM * 2,
    }
    return rows, limits


def frontier(rows: Sequence[Row], value: Callable[[Row], float]) -> list[Row]:
    """Rows than which no other of as few bytes is better, by rising bytes."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.nbytes, -value(row))):
        if not best or value(row) > value(best[-1]):
            best.append(row)
    return best


def accuracy(row: Row) -> float:
    assert row.right is not None
    assert row.count is not None
    return row.right / row.count


def print_rows(title: str, rows: Sequence[Row], limits: dict[str, object]) -> None:
    print(f"\n{title}")
    for row in rows:
        bits = ""
        if row.right is not None and row.count is not None:
            low, high = measures.wilson(row.right, row.count)
            bits = f"  {100 * accuracy(row):5.1f} % right [{100 * low:.1f}, {100 * high:.1f}]"
        share = row.nbytes / int(str(limits["block_bytes"]))
        print(
            f"  {row.nbytes:5} bytes ({100 * share:5.2f} %)  {row.name:28} "
            f"mass {row.mass:.3f}{bits}"
        )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--text", type=Path, default=default_text(), help="folder of programs")
    parser.add_argument(
        "--on", nargs="+", choices=("model", "features"), default=["model", "features"]
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.0625, help="budget, of the blocks")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--contexts", type=int, default=4, help="texts per seed")
    parser.add_argument("--questions", type=int, default=16, help="per text")
    parser.add_argument("--feature-tokens", type=int, default=131_072)
    parser.add_argument("--feature-steps", type=int, default=128)
    parser.add_argument("--feature-k", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("summaries.json"))
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.contexts, options.questions = options.seeds[:1], 1, 4
        options.tokens, options.feature_tokens, options.feature_steps = 1024, 12_288, 16
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[list[Row], dict[str, object]]]:
    from plot_summaries import plot_summaries  # which needs matplotlib: before all else

    options = parse(arguments)
    start = time.perf_counter()

    def progress(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    found = {}
    if "model" in options.on:
        found["model"] = on_model(options, all_summaries(True), progress)
    if "features" in options.on:
        found["features"] = on_features(options, all_summaries(False), progress)
    for name, (rows, limits) in found.items():
        print(f"\n{name}: {limits}")
        print_rows(f"{name}: every summary", sorted(rows, key=lambda row: row.nbytes), limits)
        print_rows(f"{name}: frontier of mass", frontier(rows, lambda row: row.mass), limits)
        if name == "model":
            print_rows(f"{name}: frontier of answers", frontier(rows, accuracy), limits)
    print(f"\n{time.perf_counter() - start:.0f} s")
    written = {
        name: {"limits": limits, "rows": [asdict(row) for row in rows]}
        for name, (rows, limits) in found.items()
    }
    options.output.write_text(json.dumps(written) + "\n", "utf-8")
    plot_summaries(found, options.output.with_suffix(".png"))
    return found


if __name__ == "__main__":
    main()

"""Why bounds miss the block that has the answer: how far above the keys' scores they lie.

    python experiments/6_accuracy/explain_bounds.py

Key-value pairs; plain PyTorch. Scores are logits: dot products over the root of ``head_dim``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

EXACT, LARGEST, QUEST = "exact scores", "largest dot product", "bounds (Quest)"


def all_summaries(block_size: int) -> dict[str, Summary]:
    """What blocks are scored by; the bounds of one token are its dot product."""
    parts = [n for n in (2, 4, 8) if n < block_size and block_size % n == 0]
    return {
        LARGEST: Summary("minmax", block_size),
        "mean key": Summary("mean"),
        QUEST: Summary("minmax"),
        "bounds before RoPE": Summary("minmax", keys="plain"),
        "bounds, heads' maximum": Summary("minmax", group="max"),
        **{f"bounds of {n} sub-blocks": Summary("minmax", n) for n in parts},
    }


def all_rules(k: int, block_size: int) -> dict[str, Rule]:
    """What the model answers with: every summary, smaller blocks, and fewer sparse layers."""
    summaries = all_summaries(block_size)
    rules = {"dense": Rule("dense"), EXACT: Rule("exact", k, block_size)}
    rules |= {name: Rule("summary", k, block_size, s) for name, s in summaries.items()}
    for times in (2, 4):
        if block_size % times == 0:
            size = block_size // times
            rules[f"{QUEST}, {times * k} blocks of {size}"] = Rule("summary", times * k, size)
    for layers, which in ((1, "layer 1"), (2, "layers 1 and 2")):
        rules[f"{QUEST}, {which} dense"] = Rule("summary", k, block_size, dense_layers=layers)
    return rules


@dataclass
class Layer:
    """Means over all steps that answer; ``found`` and the others by name of the summary."""

    attention: torch.Tensor  # [H], to the token that is the answer
    found: dict[str, torch.Tensor] = field(default_factory=dict)  # [N], answer's block chosen
    lead: dict[str, torch.Tensor] = field(default_factory=dict)  # [N], of it over the others' mean
    spread: dict[str, torch.Tensor] = field(default_factory=dict)  # [N], deviation of the others
    excess: dict[str, torch.Tensor] = field(default_factory=dict)  # [N], over largest, others
    excess_answer: dict[str, torch.Tensor] = field(default_factory=dict)  # [N], the same, answer


def look_at(
    query: torch.Tensor,
    key: torch.Tensor,
    answers: torch.Tensor,
    k: int,
    block_size: int,
    theta: float,
) -> Layer:
    """What the scores of one layer say about the blocks with the answers.

    Parameters
    ----------
    query : torch.Tensor
        ``[B, H, S, D]``.
    key : torch.Tensor
        ``[B, N, L, D]``.
    answers : torch.Tensor
        ``[B, A]``, positions of the tokens that steps ``S - A - 1`` to ``S - 2`` answer with.
    """
    num_steps, length, num_answers = query.shape[2], key.shape[2], answers.shape[1]
    steps = slice(num_steps - num_answers - 1, num_steps - 1)
    weights = measures.token_weights(query, key)[..., steps, :]
    index = answers[:, None, None, :, None].expand(*weights.shape[:-1], 1)
    layer = Layer(weights.gather(-1, index).mean((0, 3, 4)).flatten())
    num_blocks = -(-length // block_size)
    answer = torch.arange(num_blocks) == answers[..., None] // block_size  # [B, A, T]
    answer = answer[:, None].expand(-1, key.shape[1], -1, -1)

    def steps_of(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scores[..., steps, :], measures.ranks(scores, length, block_size)[..., steps, :]

    def found(ranked: torch.Tensor) -> torch.Tensor:
        return (measures.top_blocks(ranked, k) & answer).any(-1).float().mean((0, 2))

    exact, ranked = steps_of(measures.block_masses(query, key, block_size).mean(2))
    layer.found[EXACT] = found(ranked)
    # What is forced is set apart from what is chosen.
    others = (ranked == exact) & ~answer
    count = others.sum(-1)
    largest = torch.empty(0)
    for name, summary in all_summaries(block_size).items():
        scores, ranked = steps_of(measures.block_scores(query, key, block_size, summary, theta))
        layer.found[name] = found(ranked)
        of_answer = (scores * answer).sum(-1)
        mean = (scores * others).sum(-1) / count
        square = ((scores - mean[..., None]) ** 2 * others).sum(-1) / count
        layer.lead[name] = (of_answer - mean).mean((0, 2))
        layer.spread[name] = square.sqrt().mean((0, 2))
        if name == LARGEST:
            largest = scores
        if summary.kind == "minmax" and summary.keys == "rotated" and summary.group == "query":
            excess = scores - largest
            layer.excess[name] = ((excess * others).sum(-1) / count).mean((0, 2))
            layer.excess_answer[name] = (excess * answer).sum(-1).mean((0, 2))
    return layer


@dataclass
class Explanation:
    """Of all texts: right answers by rule, of ``count``; and what each text's layers showed."""

    k: int
    block_size: int
    right: dict[str, int]
    count: int
    layers: list[list[Layer]]  # by text, then layer

    def mean(self, layer: int, what: str, name: str) -> np.ndarray:
        """Over texts, ``[N]``."""
        return np.mean([getattr(text[layer], what)[name].numpy() for text in self.layers], 0)

    def attention(self, layer: int) -> np.ndarray:
        """To the token that is the answer, ``[H]``."""
        return np.mean([text[layer].attention.numpy() for text in self.layers], 0)


def explain(options: argparse.Namespace, progress: Callable[[str], None]) -> Explanation:
    """Measure everything."""
    model, tokenizer = load_model(options.model)
    simulation = simulate(model)
    text = read_tokens(tokenizer, options.text, held_out=True)
    size, k = options.block_size, budget(options.share, options.tokens, options.block_size)
    rules = all_rules(k, size)
    found = Explanation(k, size, dict.fromkeys(rules, 0), 0, [])
    for seed in options.seeds:
        progress(f"seed {seed}")
        data = gen_data_questions(
            text, "pairs", options.contexts, options.questions, options.tokens, seed
        )
        for context, questions, places in zip(
            data.contexts, data.questions, data.positions, strict=True
        ):
            cache = prefill(model, simulation, context)
            for name, rule in rules.items():
                simulation.keep = rule.kind == "dense"
                logits = continued(model, simulation, cache, questions, rule)
                found.right[name] += int(are_right(logits, questions, data.answer_tokens).sum())
                if simulation.keep:
                    answers = torch.from_numpy(places)[:, None] + torch.arange(data.answer_tokens)
                    found.layers.append(
                        [
                            look_at(query, key, answers, k, size, simulation.theta)
                            for query, key in simulation.seen
                        ]
                    )
            found.count += len(questions)
    return found


def _numbers(values: np.ndarray, digits: int) -> str:
    return " ".join(f"{value:7.{digits}f}" for value in values)


def print_tables(found: Explanation) -> None:
    """All tables, as text; KV heads side by side."""
    print(f"{found.k} blocks of {found.block_size}, {found.count} questions\n\nright answers, %")
    for name, right in found.right.items():
        low, high = measures.wilson(right, found.count)
        share = 100 * right / found.count
        print(f"  {name:40} {share:5.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    for layer, first in enumerate(found.layers[0]):
        print(f"\nlayer {layer + 1}: attention to the answer's token, by query head")
        print("  " + _numbers(found.attention(layer), 3))
        print("  share of steps that choose the answer's block, by KV head")
        for name in first.found:
            print(f"    {name:30} {_numbers(found.mean(layer, 'found', name), 3)}")
        print(
            "  lead of the answer's block over the mean of others; their deviation; how far they, "
            "and it, lie above their largest dot product"
        )
        for name in first.excess:
            row = [
                found.mean(layer, what, name)
                for what in ("lead", "spread", "excess", "excess_answer")
            ]
            print(f"    {name:30} " + "; ".join(_numbers(values, 1) for values in row))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--text", type=Path, default=default_text(), help="folder of programs")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.125, help="budget, of the blocks")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--contexts", type=int, default=12, help="texts per seed")
    parser.add_argument("--questions", type=int, default=16, help="per text")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.contexts, options.questions = options.seeds[:1], 1, 4
        options.tokens = min(options.tokens, 1024)
    return options


def main(arguments: Sequence[str] | None = None) -> Explanation:
    options = parse(arguments)
    start = time.perf_counter()
    found = explain(options, lambda message: print(message, file=sys.stderr, flush=True))
    print_tables(found)
    print(f"\n{time.perf_counter() - start:.0f} s")
    return found


if __name__ == "__main__":
    main()

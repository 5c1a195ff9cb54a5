"""What answers, perplexity and attention a budget of blocks leaves, by the rule that selects them.

python experiments/6_accuracy/evaluate_accuracy.py
"""

from __future__ import annotations

import argparse
import json
import math
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
from gen_data_retrieval import (
    TASKS,
    TEXT_STREAM,
    Questions,
    Tokenizer,
    default_text,
    gen_data_questions,
    read_tokens,
    window_of,
)
from simulated_attention import Rule, Simulation, copies, simulate
from transformers import DynamicCache, LlamaForCausalLM

MODEL_FOLDER = Path(__file__).resolve().parent / "model"
SHARES = (0.015, 0.03125, 0.0625, 0.125, 0.25, 0.5)
BLOCK_SIZES = (16, 32)
SEEDS = (101, 102, 103)  # training draws from another
NAMES = {
    "dense": "dense",
    "quest": "Quest",
    "exact": "exact scores",
    "recent": "most recent",
    "random": "random",
}


@dataclass
class Result:
    """What one rule and budget gave, over all seeds."""

    num_tokens: int
    block_size: int
    share: float
    k: int
    rule: str
    task: str
    right: list[int]  # by seed
    count: list[int]
    difference: tuple[float, float]  # to dense, 95 % interval of the share


def load_model(folder: Path = MODEL_FOLDER) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The trained model, in float32, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Tokenizer.load(folder / "vocab.json")


def budget(share: float, num_tokens: int, block_size: int) -> int:
    """Blocks of that share of a text's, one at least."""
    return max(int(share * num_tokens / block_size), 1)


@torch.no_grad()
def prefill(model: LlamaForCausalLM, simulation: Simulation, context: np.ndarray) -> DynamicCache:
    """The cache of one text, dense: ``[num_tokens]`` tokens."""
    simulation.rule = None
    cache = DynamicCache()
    model(torch.from_numpy(context)[None], cache=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def continued(
    model: LlamaForCausalLM,
    simulation: Simulation,
    cache: DynamicCache,
    tokens: np.ndarray,
    rule: Rule,
) -> torch.Tensor:
    """Logits of ``[count, S]`` tokens, each row behind the cached text, under a rule."""
    simulation.rule = rule
    simulation.seen.clear()
    simulation.generator.manual_seed(0)
    inputs = torch.from_numpy(tokens)
    return model(inputs, cache=copies(cache, len(inputs))).logits


def are_right(logits: torch.Tensor, questions: np.ndarray, answer_tokens: int) -> torch.Tensor:
    """Whether all tokens of each answer are the likeliest, ``[count]``.

    The right tokens before an answer's token are given: if a greedy decoder is right so far it has
    produced the same, so this is whether its answer is exact.
    """
    target = torch.from_numpy(questions[:, -answer_tokens:])
    return (logits[:, -answer_tokens - 1 : -1].argmax(-1) == target).all(-1)


def all_rules(num_tokens: int, block_sizes: Sequence[int], shares: Sequence[float]) -> list[Rule]:
    """Dense, and every rule with every budget."""
    return [Rule("dense")] + [
        Rule(kind, budget(share, num_tokens, size), size)
        for size in block_sizes
        for share in shares
        for kind in ("quest", "exact", "recent", "random")
    ]


def count_right(
    model: LlamaForCausalLM,
    simulation: Simulation,
    data: Questions,
    rules: Sequence[Rule],
    measure: Callable[[], None] | None = None,
) -> np.ndarray:
    """Right answers of each rule and text, ``[rules, contexts]``; `measure` runs behind dense."""
    right = np.zeros((len(rules), len(data.contexts)), int)
    for number, (context, questions) in enumerate(zip(data.contexts, data.questions, strict=True)):
        cache = prefill(model, simulation, context)
        for i, rule in enumerate(rules):
            simulation.keep = rule.kind == "dense" and measure is not None
            logits = continued(model, simulation, cache, questions, rule)
            right[i, number] = int(are_right(logits, questions, data.answer_tokens).sum())
            if simulation.keep and measure is not None:
                measure()
    return right


class MassMeter:
    """Mass held and recall of the best blocks by rule, per layer and head, in the dense model."""

    def __init__(self, simulation: Simulation, rules: Sequence[Rule], answer_tokens: int) -> None:
        self._simulation = simulation
        self._rules = [rule for rule in rules if rule.kind != "dense"]
        self._steps = slice(-answer_tokens - 1, -1)  # positions that predict an answer
        self._count = 0
        self._held: list[torch.Tensor | float] = [0.0] * len(self._rules)
        self._recall: list[torch.Tensor | float] = [0.0] * len(self._rules)

    def __call__(self) -> None:
        generator = torch.Generator().manual_seed(self._count)
        held: list[list[torch.Tensor]] = [[] for _ in self._rules]
        recall: list[list[torch.Tensor]] = [[] for _ in self._rules]
        for query, key in self._simulation.seen:
            known: dict[tuple[int, str], torch.Tensor] = {}
            masses: dict[int, torch.Tensor] = {}
            for i, rule in enumerate(self._rules):
                size = rule.block_size
                if size not in masses:
                    masses[size] = measures.block_masses(query, key, size)[..., self._steps, :]
                # The operators' own rule, as one can look into it.
                kind = "summary" if rule.kind == "quest" else rule.kind
                for name in (kind, "exact"):
                    if (size, name) not in known:
                        as_is = Rule(name, rule.k, size, rule.summary)
                        scores = as_is.scores(query, key, self._simulation.theta, generator)
                        ranked = measures.ranks(scores, key.shape[2], size)
                        known[size, name] = ranked[..., self._steps, :]
                chosen = measures.top_blocks(known[size, kind], rule.k)
                best = measures.top_blocks(known[size, "exact"], rule.k)
                held[i].append(measures.held(masses[size], chosen).mean((0, 3)).flatten())
                recall[i].append(
                    measures.recall(chosen, best, known[size, "exact"]).nanmean((0, 2))
                )
        for i in range(len(self._rules)):
            self._held[i] = self._held[i] + torch.stack(held[i])
            self._recall[i] = self._recall[i] + torch.stack(recall[i])
        self._count += 1

    def results(self) -> list[dict[str, object]]:
        """By rule: ``held`` of ``[layers, H]`` and ``recall`` of ``[layers, N]``."""
        return [
            {
                "rule": rule.kind,
                "block_size": rule.block_size,
                "k": rule.k,
                "held": (held / self._count).tolist(),
                "recall": (recall / self._count).tolist(),
            }
            for rule, held, recall in zip(self._rules, self._held, self._recall, strict=True)
            if isinstance(held, torch.Tensor) and isinstance(recall, torch.Tensor)
        ]


def text_losses(
    model: LlamaForCausalLM,
    simulation: Simulation,
    text: np.ndarray,
    num_tokens: int,
    num_windows: int,
    num_steps: int,
    rules: Sequence[Rule],
    seed: int,
) -> np.ndarray:
    """Mean loss of tokens of real text behind ``num_tokens`` others, ``[rules, windows]``."""
    rng = np.random.default_rng([seed, TEXT_STREAM])
    losses = np.zeros((len(rules), num_windows))
    simulation.keep = False
    for number in range(num_windows):
        window = window_of(text, num_tokens + num_steps + 1, rng)
        cache = prefill(model, simulation, window[:num_tokens])
        for i, rule in enumerate(rules):
            logits = continued(model, simulation, cache, window[None, num_tokens:-1], rule)
            target = torch.from_numpy(window[num_tokens + 1 :])
            losses[i, number] = torch.nn.functional.cross_entropy(logits[0], target)
    return losses


def interval_of_difference(
    one: np.ndarray, other: np.ndarray, count: int, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval, over texts, of a difference of two accuracies.

    ``one`` and ``other`` are right answers by text, of ``count`` questions each.
    """
    rng = np.random.default_rng(seed)
    difference = (one - other) / count
    draws = rng.integers(len(difference), size=(2000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


@dataclass
class Evaluation:
    """All that the tables and the picture show."""

    num_tokens: int
    parameters: int
    dense_by_length: dict[str, dict[int, tuple[int, int]]]  # by task and tokens: right, of
    results: list[Result]
    perplexities: list[dict[str, object]]
    masses: dict[str, list[dict[str, object]]]  # by task
    seconds: float = 0.0


def evaluate(options: argparse.Namespace, progress: Callable[[str], None]) -> Evaluation:
    """Measure everything."""
    start = time.perf_counter()
    model, tokenizer = load_model(options.model)
    simulation = simulate(model)
    text = read_tokens(tokenizer, options.text, held_out=True)
    num_tokens = options.tokens
    rules = all_rules(num_tokens, options.block_sizes, options.shares)
    evaluation = Evaluation(num_tokens, model.num_parameters(), {}, [], [], {})
    contexts = dict.fromkeys(TASKS, options.contexts) | {"passkey": options.passkeys}
    for task in options.tasks:
        by_length = evaluation.dense_by_length.setdefault(task, {})
        for length in options.lengths:
            right = total = 0
            for seed in options.seeds if length != num_tokens else ():
                progress(f"{task}, {length} tokens, seed {seed}: dense")
                data = gen_data_questions(
                    text,
                    task,
                    max(contexts[task] // 2, 1),
                    options.questions,
                    length,
                    seed,
                )
                right += int(count_right(model, simulation, data, [Rule("dense")]).sum())
                total += data.questions[..., 0].size
            if total:
                by_length[length] = (right, total)
        by_seed, meter = [], None
        for seed in options.seeds:
            progress(f"{task}, {num_tokens} tokens, seed {seed}: {len(rules)} rules and budgets")
            data = gen_data_questions(
                text, task, contexts[task], options.questions, num_tokens, seed
            )
            meter = meter or MassMeter(simulation, rules, data.answer_tokens)
            by_seed.append(count_right(model, simulation, data, rules, meter))
        count = data.questions.shape[1]
        dense = np.concatenate([right[0] for right in by_seed])
        by_length[num_tokens] = (int(dense.sum()), len(dense) * count)
        for i, rule in enumerate(rules):
            share = rule.k * rule.block_size / num_tokens
            evaluation.results.append(
                Result(
                    num_tokens,
                    rule.block_size,
                    nearest(share, options.shares) if rule.k else 1.0,
                    rule.k,
                    rule.kind,
                    task,
                    [int(right[i].sum()) for right in by_seed],
                    [right.shape[1] * count for right in by_seed],
                    interval_of_difference(
                        np.concatenate([right[i] for right in by_seed]), dense, count
                    ),
                )
            )
        assert meter is not None
        evaluation.masses[task] = meter.results()
    losses = []
    for seed in options.seeds if options.windows else ():
        progress(f"perplexity, seed {seed}")
        losses.append(
            text_losses(
                model, simulation, text, num_tokens, options.windows, options.steps, rules, seed
            )
        )
    for i, rule in enumerate(rules if losses else ()):
        together = np.concatenate(losses, 1)
        evaluation.perplexities.append(
            {
                "rule": rule.kind,
                "block_size": rule.block_size,
                "k": rule.k,
                "perplexity": float(np.exp(together[i].mean())),
                "by_seed": [float(np.exp(loss[i].mean())) for loss in losses],
            }
        )
    evaluation.seconds = time.perf_counter() - start
    return evaluation


def nearest(share: float, shares: Sequence[float]) -> float:
    return min(shares, key=lambda other: abs(math.log(other / share)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def print_tables(evaluation: Evaluation, block_sizes: Sequence[int]) -> None:
    """All tables, as text."""
    print(f"model: {evaluation.parameters:,} parameters; text: {evaluation.num_tokens:,} tokens\n")
    print("dense accuracy by length, %, with 95 % interval (Wilson)")
    for task, by_length in evaluation.dense_by_length.items():
        for length, (right, count) in sorted(by_length.items()):
            low, high = measures.wilson(right, count)
            print(
                f"  {task:8} {length:5} tokens  {_percent(right / count):>5}  "
                f"[{_percent(low)}, {_percent(high)}]  {right} of {count}"
            )
    for task in evaluation.dense_by_length:
        for size in block_sizes:
            print(
                f"\n{task}, blocks of {size}: accuracy, % [95 % interval] (by seed; difference to "
                "dense, points [interval])"
            )
            for result in evaluation.results:
                if result.task != task or (result.block_size != size and result.rule != "dense"):
                    continue
                right, count = sum(result.right), sum(result.count)
                low, high = measures.wilson(right, count)
                seeds = " ".join(
                    _percent(r / n) for r, n in zip(result.right, result.count, strict=True)
                )
                dense_right, dense_count = evaluation.dense_by_length[task][evaluation.num_tokens]
                difference = right / count - dense_right / dense_count
                share = "all" if result.rule == "dense" else f"{_percent(result.share)} %"
                print(
                    f"  {share:>7} k={result.k:<4} {NAMES[result.rule]:12} "
                    f"{_percent(right / count):>5} [{_percent(low)}, {_percent(high)}]  ({seeds}; "
                    f"{100 * difference:+.1f} [{100 * result.difference[0]:+.1f}, "
                    f"{100 * result.difference[1]:+.1f}])"
                )
    for size in block_sizes:
        print(f"\nperplexity of held-out text, blocks of {size} (by seed)")
        for row in evaluation.perplexities:
            if row["block_size"] == size or row["rule"] == "dense":
                seeds = " ".join(f"{p:.3f}" for p in row["by_seed"])
                print(
                    f"  k={row['k']:<4} {NAMES[row['rule']]:12} {row['perplexity']:.3f} ({seeds})"
                )
    for task, rows in evaluation.masses.items():
        for size in block_sizes:
            print(
                f"\n{task}, blocks of {size}: attention mass held, mean (by layer: by head), and "
                "recall of the exact best blocks (by layer: by KV head)"
            )
            for row in rows:
                if row["block_size"] != size:
                    continue
                held, found = np.array(row["held"]), np.array(row["recall"])
                print(
                    f"  k={row['k']:<4} {NAMES[row['rule']]:12} {held.mean():.3f} ("
                    + "; ".join(" ".join(f"{x:.2f}" for x in layer) for layer in held)
                    + f")  {found.mean():.3f} ("
                    + "; ".join(" ".join(f"{x:.2f}" for x in layer) for layer in found)
                    + ")"
                )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--text", type=Path, default=default_text(), help="folder of programs")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096], help="dense alone")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--contexts", type=int, default=12, help="texts per task and seed")
    parser.add_argument("--questions", type=int, default=16, help="per text")
    parser.add_argument("--passkeys", type=int, default=170, help="texts with a pass key, per seed")
    parser.add_argument("--windows", type=int, default=16, help="texts for perplexity, per seed")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each that count")
    parser.add_argument("--output", type=Path, default=Path("accuracy.json"))
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.lengths = options.seeds[:1], []
        options.contexts, options.passkeys, options.questions = 2, 2, 8
        options.windows, options.steps, options.shares = 2, 16, [0.03125, 0.125]
        options.tokens = min(options.tokens, 1024)
    return options


def main(arguments: Sequence[str] | None = None) -> Evaluation:
    from plot_accuracy import plot_accuracy  # which needs matplotlib: before anything is measured

    options = parse(arguments)

    def progress(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    evaluation = evaluate(options, progress)
    print_tables(evaluation, options.block_sizes)
    print(f"\n{evaluation.seconds:.0f} s")
    options.output.write_text(json.dumps(asdict(evaluation)) + "\n", "utf-8")
    plot_accuracy(evaluation, options.output.with_suffix(".png"))
    return evaluation


if __name__ == "__main__":
    main()

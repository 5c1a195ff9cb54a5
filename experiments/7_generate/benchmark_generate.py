"""Tokens per second of generate(), dense and sparse, on a model with random weights."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: F401  (makes every experiment's modules importable)
import torch
from common.devices import device_or_exit, script_parser, seconds
from select_attn_ops.integrations.transformers import QuestCache, register
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.cache_utils import Cache

# Tokens per call while the caches are filled: what the layers between hold for them is memory too.
_CHUNK = 4096


@dataclass
class Way:
    """A cache, and the attention that reads it."""

    name: str
    attention: str
    cache: Cache


@dataclass
class Result:
    """Of one way and context length."""

    name: str
    tokens: int
    per_second: float  # tokens generated, median of rounds


def make_model(layers: int, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Return a model of Qwen3-0.6B's shape, but for its layers (28) and vocabulary (151,936)."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(device, dtype).eval()


def fill(model: Qwen3ForCausalLM, way: Way, context: torch.Tensor) -> None:
    """Put the keys and values of all tokens but the last into the cache.

    Dense attention over a long context takes far longer than the steps to be measured, so it is
    left out: the layers' attention returns its queries. All caches get the same.
    """
    model.set_attn_implementation(way.attention)
    attention = "torch.nn.functional.scaled_dot_product_attention"
    with torch.no_grad(), mock.patch(attention, lambda query, *others, **options: query):
        for tokens in context[:, :-1].split(_CHUNK, dim=1):
            model(tokens, cache=way.cache, logits_to_keep=1)


def measure(
    model: Qwen3ForCausalLM,
    ways: Sequence[Way],
    context: torch.Tensor,
    rounds: int,
    new_tokens: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Let every way continue the context in turn; the first round does not count.

    Parameters
    ----------
    context : torch.Tensor
        ``[1, T]`` int64; every round goes on where the one before ended.
    """
    taken: list[list[float]] = [[] for _ in ways]
    for way in ways:
        progress(f"{context.shape[1]} tokens: filling the cache of {way.name}")
        fill(model, way, context)
    texts = [context] * len(ways)
    for number in range(rounds + 1):
        progress(f"{context.shape[1]} tokens: round {number} of {rounds}")
        for i, way in enumerate(ways):
            model.set_attn_implementation(way.attention)

            def go_on(i: int = i, way: Way = way) -> None:
                texts[i] = model.generate(
                    texts[i],
                    attention_mask=torch.ones_like(texts[i]),
                    cache=way.cache,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                )

            taken[i].append(seconds(go_on, context.device))
    return [
        Result(way.name, context.shape[1], new_tokens / statistics.median(times[1:]))
        for way, times in zip(ways, taken, strict=True)
    ]


def compare(
    model: Qwen3ForCausalLM,
    tokens: int,
    budget: int,
    rounds: int,
    new_tokens: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Measure both of transformers' caches and `QuestCache` at one context length."""
    longest = tokens + (rounds + 1) * new_tokens
    ways = [
        Way("dense, DynamicCache", "sdpa", DynamicCache(config=model.config)),
        Way("dense, StaticCache", "sdpa", StaticCache(config=model.config, max_cache_len=longest)),
        Way(
            f"sparse, budget {budget}",
            "quest",
            QuestCache(model.config, budget=budget, dense_layers=0, max_length=longest),
        ),
    ]
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(1, model.config.vocab_size, (1, tokens), generator=generator)
    return measure(model, ways, context.to(model.device), rounds, new_tokens, progress)


def table(results: Sequence[Result]) -> str:
    """Return a line per result, each beside the fastest dense one of its context length."""
    lines = ["| context | attention, cache | tokens/s | over the best dense |", "|---|---|---|---|"]
    for result in results:
        dense = [r.per_second for r in results if r.tokens == result.tokens and "dense" in r.name]
        ratio = result.per_second / max(dense)
        lines.append(f"| {result.tokens} | {result.name} | {result.per_second:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = script_parser("Tokens per second of generate(), dense and sparse.")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="context lengths"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=8, help="per round")
    parser.add_argument("--quick", action="store_true", help="to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.layers, options.budget, options.rounds = [1024], 1, 256, 1
    device = device_or_exit(options.device)
    register()
    model = make_model(options.layers, device, torch.bfloat16)
    print(
        f"Qwen3-0.6B's shape with {options.layers} layers, bfloat16, {device}, "
        f"{torch.get_num_threads()} threads, batch 1, {options.new_tokens} tokens per round"
    )
    results = []
    for tokens in options.tokens:
        results += compare(
            model,
            tokens,
            options.budget,
            options.rounds,
            options.new_tokens,
            lambda message: print(message, flush=True),
        )
    print(table(results))


if __name__ == "__main__":
    main()

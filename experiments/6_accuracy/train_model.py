"""Trains the small model: a Llama that finds things in long text.

python experiments/6_accuracy/train_model.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: F401  (makes every experiment's modules importable)
import numpy as np
import torch
from gen_data_retrieval import (
    PAIR,
    PASSAGE,
    TEXT,
    Tokenizer,
    default_text,
    gen_data_training,
    read_texts,
    read_tokens,
)
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
HEAD_DIM = 32
# Of the mean loss of each kind of token.
_WEIGHTS = {TEXT: 0.3, PAIR: 1.0, PASSAGE: 1.0}
_WARMUP = 50
# Attention falls to a tenth from the right token to its neighbours.
_POSITION_BIAS = 6.0


@dataclass(frozen=True)
class Stage:
    """Steps of the curriculum with texts of one length."""

    num_tokens: int
    batch: int
    steps: int
    rate: float  # learning rate at its beginning
    end: float  # and at its end; in between it falls linearly


CURRICULUM = (
    Stage(128, 16, 600, 2e-3, 2e-3),
    Stage(256, 8, 300, 2e-3, 1.5e-3),
    Stage(512, 4, 300, 1.5e-3, 1.2e-3),
    Stage(1024, 3, 250, 1.2e-3, 1e-3),
    Stage(2048, 2, 200, 1e-3, 8e-4),
    Stage(4096, 1, 300, 8e-4, 4e-5),
)


def new_model(seed: int, head_dim: int = HEAD_DIM) -> LlamaForCausalLM:
    """The model before training."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.06,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            _look_for_alike(layer.self_attn, config)
            layer.mlp.down_proj.weight.mul_(0.1)
        _look_at_preceding_tokens(model)
    return model


def _look_for_alike(attention: torch.nn.Module, config: LlamaConfig) -> None:
    """Let heads begin with attention to tokens that are alike, and pass on what they see.

    The product of query and key projections is symmetric and positive, as is that of value and
    output projections (Trockman and Kolter, *Mimetic initialization of self-attention layers*).
    """
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    repeats = num_heads // num_kv_heads

    def of_each_head(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(num_kv_heads, -1, config.hidden_size).repeat_interleave(repeats, 0)

    alike = of_each_head(attention.k_proj.weight).flatten(0, 1)
    attention.q_proj.weight.mul_(0.3).add_(alike)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(1.5)
    seen = of_each_head(attention.v_proj.weight).flatten(0, 1).T
    attention.o_proj.weight.mul_(0.1).add_(0.3 * seen)


def _look_at_preceding_tokens(model: LlamaForCausalLM) -> None:
    """Let the heads of the first layer begin with attention to the tokens 1, 2, 3 and 4 back.

    What is before a token is what it is found by. Models find that out by themselves, which takes
    most of their training. Biases in the channels that RoPE turns fastest, those of the query
    turned back by some tokens, make it a matter of position alone.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    half = config.head_dim // 2
    turned = torch.arange(6)
    rates = config.rope_parameters["rope_theta"] ** (-turned / half)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(0.3)
    key = attention.k_proj.bias.view(-1, config.head_dim)
    query = attention.q_proj.bias.view(-1, config.head_dim)
    key[:, turned] = _POSITION_BIAS
    for head, back in enumerate(range(1, len(query) + 1)):
        query[head, turned] = _POSITION_BIAS * (back * rates).cos()
        query[head, turned + half] = -_POSITION_BIAS * (back * rates).sin()


def losses(
    model: LlamaForCausalLM, tokens: torch.Tensor, kinds: torch.Tensor
) -> tuple[torch.Tensor, dict[int, tuple[float, float]]]:
    """The loss, and by kind of token its mean loss and the share predicted right."""
    logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    target, kind = tokens[:, 1:].flatten(), kinds[:, 1:].flatten()
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    right = logits.detach().argmax(-1) == target
    total, parts = torch.zeros((), device=each.device), {}
    for number, weight in _WEIGHTS.items():
        chosen = kind == number
        if chosen.any():
            mean = each[chosen].mean()
            total = total + weight * mean
            parts[number] = float(mean.detach()), float(right[chosen].float().mean())
    return total, parts


def train(
    text: np.ndarray,
    curriculum: tuple[Stage, ...] = CURRICULUM,
    seed: int = SEED,
    device: str = "cpu",
    log_every: int = 25,
    after_stage: Callable[[LlamaForCausalLM], None] = lambda model: None,
    head_dim: int = HEAD_DIM,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Train a new model; returns it and the loss of each step."""
    model = new_model(seed, head_dim).to(device).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.98),
    )
    rng = np.random.default_rng(seed)
    history: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    for stage in curriculum:
        for step in range(stage.steps):
            rate = stage.rate + (stage.end - stage.rate) * step / stage.steps
            rate *= min(1.0, (len(history) + 1) / _WARMUP)
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens, kinds = gen_data_training(text, stage.batch, stage.num_tokens, rng)
            loss, parts = losses(
                model, torch.from_numpy(tokens).to(device), torch.from_numpy(kinds).to(device)
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.append(float(loss.detach()))
            if log_every and len(history) % log_every == 0:
                shown = "  ".join(
                    f"{name} {parts[number][0]:.3f} ({parts[number][1]:.3f} right)"
                    for number, name in ((PAIR, "pairs"), (PASSAGE, "passages"), (TEXT, "text"))
                    if number in parts
                )
                print(
                    f"step {len(history):5}  {stage.num_tokens:5} tokens  {shown}  "
                    f"{time.perf_counter() - wall:.0f} s ({time.process_time() - cpu:.0f} s of "
                    "processors)",
                    flush=True,
                )
        after_stage(model)
    return model.eval(), history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument("--until", type=int, default=2048, help="longest texts of the curriculum")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on which the last bits depend")
    parser.add_argument("--text", type=Path, default=default_text())
    parser.add_argument("--output", type=Path, default=Path("out/model"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_text(read_texts(options.text, held_out=False))
    text = read_tokens(tokenizer, options.text, held_out=False)
    print(f"{len(text):,} tokens to train on")

    def save(model: LlamaForCausalLM) -> None:
        model.save_pretrained(options.output)
        tokenizer.save(options.output / "vocab.json")

    curriculum = tuple(stage for stage in CURRICULUM if stage.num_tokens <= options.until)
    model, _ = train(
        text,
        curriculum,
        seed=options.seed,
        device=options.device,
        after_stage=save,
        head_dim=options.head_dim,
    )
    print(f"{options.output}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

"""What a budget keeps of attention, against plain arithmetic, and the command end to end."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from error_texts import is_documented, raises
from safetensors.torch import save_file
from select_attn_ops import QuestDecoder
from select_attn_ops.__main__ import main
from select_attn_ops.recall import command, loading, measures
from select_attn_ops.recall.model import capture
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)


def make(
    num_tokens: int = 75, num_steps: int = 7, dtype: torch.dtype = torch.float32
) -> measures.Layer:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, num_tokens, 8, generator=generator).to(dtype)
    queries = (2 * torch.randn(6, num_steps, 8, generator=generator)).to(dtype)
    positions = torch.randint(0, num_tokens, (num_steps,), generator=generator)
    return measures.Layer(keys, queries, positions)


def naive_mass(layer: measures.Layer, block_size: int) -> torch.Tensor:
    """`block_mass` in Python's floats, token by token."""
    keys, queries = layer.keys.tolist(), layer.queries.tolist()
    group = len(queries) // len(keys)
    num_blocks = -(-len(keys[0]) // block_size)
    mass = torch.zeros(len(layer.positions), len(keys), num_blocks, dtype=torch.float64)
    scale = len(keys[0][0]) ** -0.5 if layer.scale is None else layer.scale
    for head, heads_queries in enumerate(queries):
        for step, position in enumerate(layer.positions.tolist()):
            query = heads_queries[step]
            weights = [
                math.exp(scale * sum(a * b for a, b in zip(query, key, strict=True)))
                for key in keys[head // group][: position + 1]
            ]
            for token, weight in enumerate(weights):
                share = weight / sum(weights) / group
                mass[step, head // group, token // block_size] += share
    return mass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 100])
def test_mass_is_that_of_a_naive_loop(block_size: int, dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    got = measures.block_mass(layer, block_size)
    torch.testing.assert_close(got.double(), naive_mass(layer, block_size), rtol=1e-4, atol=1e-6)


def test_selection_is_that_of_a_decoder() -> None:
    layer = make(num_tokens=160, num_steps=9)
    got = measures.Selector(layer, 16, 1)(5)
    cache = layer.keys.transpose(0, 1).reshape(10, 16, 2, 8).contiguous()
    decoder = QuestDecoder(
        cache, cache, num_heads=6, k=5, max_batch=1, max_blocks=10, recent_blocks=1
    )
    table = torch.arange(10, dtype=torch.int32)[None]
    for step, position in enumerate(layer.positions.tolist()):
        length = torch.tensor([position + 1], dtype=torch.int32)
        decoder.prefill(table, length)
        query = layer.queries[:, step].contiguous()[None]
        assert torch.equal(got[step], decoder.select(query, table, length)[0])


def test_known_answer() -> None:
    """All the mass is in block 2 of 8, which a budget of 4 blocks selects by its score."""
    keys, queries = torch.zeros(1, 32, 8), torch.zeros(1, 1, 8)
    keys[0, 9, 0], queries[0, 0, 0] = 100.0, 10.0
    layer = measures.Layer(keys, queries, torch.tensor([31]))
    shares = measures.measure(layer, 4, [1, 4], 1, torch.Generator().manual_seed(0))[..., 0]
    selected, best, recent, _, recall = shares.T.tolist()
    assert selected == pytest.approx([0, 1], abs=1e-6)
    assert best == pytest.approx([1, 1])
    assert recent == pytest.approx([0, 0], abs=1e-6)
    assert recall[0] == 0
    assert recall[1] > 0


def test_recalled_counts_only_blocks_that_exist() -> None:
    best = torch.tensor([[[2, 0, 5, 7]]])
    selected = torch.tensor([[[0, 1, 5, -1]]])
    assert measures.recalled(best, selected, torch.tensor([3])).tolist() == [[0.5]]
    assert measures.recalled(best, selected, torch.tensor([8])).tolist() == [[0.5]]
    assert measures.recalled(best, selected, torch.tensor([6])).item() == pytest.approx(2 / 3)


def test_a_model_shows_what_eager_attention_computes() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (1, 70))
    seen: dict[int, torch.Tensor] = {}

    def see(name: int, layer: measures.Layer) -> None:
        seen[name] = measures.block_mass(layer, 16)

    before = model.config._attn_implementation
    assert capture(model, tokens, 5, see) == 70
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    assert sorted(seen) == [0, 1, 2]
    for name, weights in enumerate(attentions):
        last = torch.nn.functional.pad(weights[0, :, -5:], (0, 10)).unflatten(-1, (5, 16)).sum(-1)
        expected = last.unflatten(0, (2, 3)).mean(1).transpose(0, 1)
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-5)


HERE = Path(__file__).parent
MODEL = ["--model", str(HERE), "--text", "no"]
KEYS, QUERIES = torch.zeros(2, 9, 4), torch.zeros(4, 3, 4)


@pytest.mark.parametrize(
    ("keys", "queries", "positions", "text"),
    [
        (KEYS[0], QUERIES, None,
         "keys must be [num_kv_heads, num_tokens, head_dim] or [layers, num_kv_heads, num_tokens, "
         "head_dim], got [9, 4]"),
        (KEYS.double(), QUERIES, None,
         "keys must be float16, bfloat16 or float32, got torch.float64"),
        (KEYS, QUERIES.half(), None,
         "queries must be torch.float32 as the keys, got torch.float16"),
        (KEYS, QUERIES[:, :, :3], None,
         "queries must be [1, *, *, 4] as the keys, got [1, 4, 3, 3]"),
        (KEYS, QUERIES[:3], None, "the query heads must be a multiple of the 2 KV heads, got 3"),
        (KEYS[:, :2], QUERIES, None, "expected at most 2 queries per head, got 3"),
        (KEYS[:, :0], QUERIES, None, "keys must not be empty, got [2, 0, 4]"),
        (KEYS, QUERIES, torch.arange(2), "positions must be [3] integers, got [2] torch.int64"),
        (KEYS, QUERIES, torch.arange(7, 10), "positions must be in [0, 9), got 7 to 9"),
        (KEYS, QUERIES / 0, None, "queries must be finite, got infinities or NaN"),
    ],
)  # fmt: skip
def test_wrong_tensors(keys: Any, queries: Any, positions: Any, text: str) -> None:
    with raises(ValueError, text):
        loading.layers(keys, queries, positions)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "expected --keys and --queries, or --model and --text"),
        (["--keys", "a.npy", "--queries", "a.npy", "--text", "a"],
         "expected --keys and --queries, or --model and --text"),
        ([*MODEL, "--positions", "a.npy"], "--positions goes with --keys and --queries only"),
        (["--keys", "no.npy", "--queries", "no.npy"], "--keys must be a file, got no.npy"),
        (["--keys", __file__, "--queries", "no.npy"],
         f"--keys must end in .npy or .safetensors, got {__file__}"),
        (["--model", "no", "--text", __file__], "--model must be a folder, got no"),
        (MODEL, "--text must be a file, got no"),
        ([*MODEL, "--mass", "2"], "--mass must be in (0, 1], got 2.0"),
        ([*MODEL, "--tokens", "0"], "--tokens must be at least 1, got 0"),
        ([*MODEL, "--steps", "0"], "--steps must be at least 1, got 0"),
        ([*MODEL, "--block-size", "0"], "--block-size must be at least 1, got 0"),
        ([*MODEL, "--recent-blocks", "-1"], "--recent-blocks must be at least 0, got -1"),
        ([*MODEL, "--budgets", "8"], "--budgets must be at least a block of 16, got 8"),
        ([*MODEL, "--json", "no/a.json"],
         "--json must be in a folder that exists, got no/a.json"),
        ([*MODEL, "--plot", "no/a.png"], "--plot must be in a folder that exists, got no/a.png"),
        ([*MODEL, "--json", "."], "--json must be no folder, got ."),
    ],
)  # fmt: skip
def test_wrong_options(arguments: list[str], text: str, capsys: Any) -> None:
    assert main(["recall", *arguments]) == 1
    assert capsys.readouterr().err == f"error: {text}\n"
    assert is_documented(text)


def test_wrong_files(tmp_path: Path, capsys: Any) -> None:
    pair, text = tmp_path / "pair.safetensors", tmp_path / "text.txt"
    save_file({"one": KEYS, "other": KEYS.clone()}, pair)
    with raises(
        ValueError, f"{pair} must have one tensor, or one named keys, got ['one', 'other']"
    ):
        loading.load(pair, "keys")
    text.write_bytes(b"\xff")
    for path, expected in (
        (text, f"--text {text} must be in UTF-8: 'utf-8' codec can't decode byte 0xff in "),
        (Path(__file__), f"--model {tmp_path} does not load: "),
    ):
        assert main(["recall", "--model", str(tmp_path), "--text", str(path)]) == 1
        message = capsys.readouterr().err.removeprefix("error: ").strip()
        assert message.startswith(expected)
        assert is_documented(message)


def test_a_picture_of_an_unknown_kind(capsys: Any) -> None:
    assert main(["recall", *MODEL, "--plot", "a.nonsense"]) == 1
    message = capsys.readouterr().err.removeprefix("error: ").strip()
    assert re.fullmatch(r"--plot must end in one of \..*\.png.*, got a\.nonsense", message)
    assert is_documented(message)


@pytest.mark.parametrize("damage", ["cut", "other sizes"])
def test_a_damaged_model(damage: str, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    text = save_model(LlamaForCausalLM(LlamaConfig(**TINY)), folder)
    if damage == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        LlamaConfig(**TINY | {"intermediate_size": 48}).save_pretrained(folder)
    assert main(["recall", "--model", str(folder), "--text", str(text)]) == 1
    message = capsys.readouterr().err.partition("error: ")[2].strip()
    assert message.startswith(f"--model {folder} does not load: ")


def test_a_text_without_tokens(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    text = save_model(LlamaForCausalLM(LlamaConfig(**TINY)), folder)
    text.write_text("")
    assert main(["recall", "--model", str(folder), "--text", str(text)]) == 1
    message = capsys.readouterr().err.strip().partition("error: ")[2]
    assert message == f"--model {folder} has no tokenizer for this text, or the text is empty"
    assert is_documented(message)


def test_a_text_of_fewer_tokens_than_steps() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    with raises(ValueError, "--steps must be in [1, 3] for this text, got 4"):
        capture(model, torch.arange(3)[None], 4, lambda *seen: None)


@pytest.mark.parametrize(
    ("missing", "arguments", "text"),
    [
        ("matplotlib", [*MODEL, "--plot", "a.png"], "--plot needs matplotlib: "),
        ("transformers", ["--model", str(HERE), "--text", __file__],
         "--model needs transformers: "),
        ("safetensors", ["--keys", "a.safetensors", "--queries", "a.safetensors"],
         "a.safetensors needs safetensors: pip install safetensors"),
    ],
)  # fmt: skip
def test_what_is_not_installed(
    missing: str,
    arguments: list[str],
    text: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["recall", *arguments]) == 1
    message = capsys.readouterr().err.removeprefix("error: ").strip()
    assert message.startswith(text)
    assert is_documented(message)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_the_command(kind: str, tmp_path: Path, capsys: Any) -> None:
    layer = make(num_tokens=300)
    files = {name: tmp_path / f"{name}.{kind}" for name in ("keys", "queries", "positions")}
    tensors = {
        "keys": torch.stack([layer.keys, layer.keys / 2]),
        "queries": torch.stack([layer.queries] * 2),
        "positions": torch.arange(290, 297),
    }
    for name, path in files.items():
        if kind == "npy":
            np.save(path, tensors[name].numpy())
        else:
            save_file({name: tensors[name]}, path)
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    arguments = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    arguments += ["--json", str(figures), "--plot", str(picture), "--budgets", "64", "512"]
    assert main(["recall", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.endswith(
        "The smallest of these budgets that holds 0.9 of the mass on average: "
        "512 tokens (32 blocks).\n"
    )
    result = json.loads(figures.read_text())
    assert (result["blocks"], result["layers"]) == ([4, 32], [0, 1])
    for name in measures.MEASURES:
        assert np.array(result[name]).shape == (2, 2, 2)
        assert np.array(result[name])[:, 1] == pytest.approx(1, abs=1e-5)
    assert (np.array(result["selected"]) <= np.array(result["best"]) + 1e-6).all()
    assert picture.read_bytes().startswith(b"\x89PNG")


def save_model(model: Any, folder: Path) -> Path:
    """The model, a tokenizer of 60 words, and a text of 500, whose file is returned."""
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 60)}
    words_only = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    words_only.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i % 60}" for i in range(500)))
    return text


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_model_of_nothing_but_sliding_windows(tmp_path: Path, capsys: Any) -> None:
    config = MistralConfig(**TINY, sliding_window=16)
    text = save_model(MistralForCausalLM(config), tmp_path)
    assert main(["recall", "--model", str(tmp_path), "--text", str(text)]) == 1
    message = "expected a layer without a sliding window, got none"
    assert capsys.readouterr().err.endswith(f"error: {message}\n")
    assert is_documented(message)


def test_the_command_with_a_model(tmp_path: Path, capsys: Any) -> None:
    text = save_model(LlamaForCausalLM(LlamaConfig(**TINY)), tmp_path)
    figures = tmp_path / "figures.json"
    arguments = ["--model", str(tmp_path), "--text", str(text), "--json", str(figures)]
    arguments += ["--tokens", "300", "--steps", "4", "--budgets", "64", "304", "--mass", "0.99"]
    assert main(["recall", *arguments]) == 0
    assert "304 tokens (19 blocks)." in capsys.readouterr().out
    result = json.loads(figures.read_text())
    assert result["layers"] == [0, 1]
    # All but uniform attention, of which the 4 blocks hold what they have of 300 tokens.
    assert np.array(result["recent"])[:, 0] == pytest.approx(60 / 298, abs=0.02)


def test_a_model_whose_attention_is_not_plain() -> None:
    """Sinks take a share of the mass."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with raises(NotImplementedError, "attention with s_aux is not supported"):
        capture(GptOssForCausalLM(config).eval(), torch.arange(1, 9)[None], 2, lambda *seen: None)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_broken_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"keys{suffix}"
    for content in (b"", b"not a tensor"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"--keys {path} does not load: ")) as caught:
            loading.load(path, "keys")
        assert is_documented(str(caught.value))


def test_the_hint_says_when_no_budget_is_enough() -> None:
    assert command.hint([4, 8], [0.5, 0.7], 16, 0.6).endswith("128 tokens (8 blocks).")
    assert command.hint([4, 8], [0.5, 0.7], 16, 0.9).startswith("None of these budgets holds 0.9")

"""The adapter for transformers: tiny models with random weights, through `generate`."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from error_texts import is_documented, raises
from select_attn_ops.integrations.transformers import QuestCache, register
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, PAD = 96, 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    # Large weights: attention that is far from uniform.
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"num_attention_heads": 3, "num_key_value_heads": 3, "sliding_window": None},
    ),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "qwen3-sliding": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 24,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_multiplier": 0.2},
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2},
    ),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}
TINY = COMMON | FAMILIES["llama"][2]
every_family = pytest.mark.parametrize("family", FAMILIES)

register()


def make_model(family: str, implementation: str = "quest", **changes: object) -> Any:
    make_config, make, options = (FAMILIES | OTHERS)[family]
    torch.manual_seed(0)
    model = make(make_config(**COMMON | options | changes)).eval()
    model.set_attn_implementation(implementation)
    return model


def make_prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Padded on the left, as tokenizers do it for `generate`."""
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    tokens = torch.randint(1, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens.where(mask == 1, PAD), "attention_mask": mask}


def generate(model: Any, prompts: dict[str, torch.Tensor], cache: Any, **options: Any) -> Any:
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**prompts, cache=cache, output_logits=True, **settings | options)


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **tolerance)


def reference(model: Any, prompts: dict[str, torch.Tensor], **options: Any) -> Any:
    """What dense attention of transformers gives."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    result = generate(model, prompts, DynamicCache(config=model.config), **options)
    model.set_attn_implementation(implementation)
    return result


@every_family
@pytest.mark.parametrize("lengths", [(70,), (50, 70, 3), (1, 1)], ids=str)
def test_budget_above_the_length_is_dense_attention(family: str, lengths: tuple[int, ...]) -> None:
    model, prompts = make_model(family), make_prompts(*lengths)
    expected = reference(model, prompts)
    for options in ({}, {"budget": 96, "dense_below": 0}, {"dense_layers": 0}, {"block_size": 5}):
        got = generate(model, prompts, QuestCache(model.config, **options))
        assert_same(got, expected)


QUEST: dict[str, int] = {}
"""Options of `quest_from_scratch`."""


def quest_from_scratch(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function that does it all over dense keys and values, in float64."""
    total = key.shape[2]
    if query.shape[2] > 1 or module.layer_idx < QUEST["dense_layers"] or sliding_window:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    size, k = QUEST["block_size"], QUEST["k"]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(len(query)):
        pad = 0 if attention_mask is None else int((~attention_mask[b, 0, 0]).sum())
        full, count = divmod(total - pad, size)
        count = full + (count > 0)
        forced = list(range(max(full - QUEST["recent_blocks"], 0), count))[::-1]
        forced += [0] if 0 not in forced else []
        for n, heads in enumerate(torch.arange(query.shape[1]).chunk(key.shape[1])):
            q = query[b, heads, 0].double()
            keys, values = key[b, n, pad:].double(), value[b, n, pad:].double()
            blocks = keys[: full * size].view(full, size, keys.shape[-1])
            bound = torch.maximum(q.mean(0) * blocks.amax(1), q.mean(0) * blocks.amin(1)).sum(-1)
            ranked = [j for j in bound.argsort(descending=True).tolist() if j not in forced]
            chosen = (forced + ranked)[:k]
            at = [t for j in chosen for t in range(j * size, min((j + 1) * size, len(keys)))]
            out[b, heads, 0] = (q @ keys[at].T * scaling).softmax(-1) @ values[at]
    return out.transpose(1, 2).to(query.dtype), None


AttentionInterface.register("quest-from-scratch", quest_from_scratch)
AttentionMaskInterface.register("quest-from-scratch", AttentionMaskInterface()["sdpa"])


def from_scratch(model: Any, prompts: Any, options: dict[str, int], **settings: Any) -> Any:
    QUEST.update(options)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("quest-from-scratch")
    result = generate(model, prompts, DynamicCache(config=model.config), **settings)
    model.set_attn_implementation(implementation)
    return result


@every_family
@pytest.mark.parametrize(
    ("block_size", "k", "recent_blocks", "dense_layers"),
    [(4, 5, 1, 2), (3, 4, 0, 1), (7, 4, 2, 0), (4, 1, 1, 0), (4, 2, 1, 1)],
)
@pytest.mark.parametrize("lengths", [(64,), (50, 64, 2)], ids=str)
def test_decodes_as_quest_from_scratch(
    family: str,
    block_size: int,
    k: int,
    recent_blocks: int,
    dense_layers: int,
    lengths: tuple[int, ...],
) -> None:
    options = {
        "block_size": block_size,
        "k": k,
        "recent_blocks": recent_blocks,
        "dense_layers": dense_layers,
    }
    model, prompts = make_model(family), make_prompts(*lengths)
    expected = from_scratch(model, prompts, options, max_new_tokens=20)
    got = generate(model, prompts, QuestCache(model.config, **options), max_new_tokens=20)
    assert_same(got, expected)
    dense = reference(model, prompts, max_new_tokens=20)
    assert not torch.allclose(got.logits[-1], dense.logits[-1], atol=1e-2)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str) -> None:
    model, prompts = make_model(family), make_prompts(50, 64, 2)
    dense = reference(model, prompts)
    assert_same(generate(model, prompts, QuestCache(model.config)), dense)
    options = {"block_size": 4, "k": 5, "recent_blocks": 1, "dense_layers": 1}
    got = generate(model, prompts, QuestCache(model.config, **options))
    assert_same(got, from_scratch(model, prompts, options))
    assert not torch.allclose(got.logits[-1], dense.logits[-1], atol=1e-2)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_block_boundaries(length: int) -> None:
    model, prompts = make_model("llama"), make_prompts(length, max(length - 1, 1))
    options = {"block_size": 4, "k": 4, "recent_blocks": 1, "dense_layers": 0}
    expected = from_scratch(model, prompts, options, max_new_tokens=9)
    got = generate(model, prompts, QuestCache(model.config, **options), max_new_tokens=9)
    assert_same(got, expected)


@torch.no_grad()
def test_reads_only_the_selected_blocks() -> None:
    model, prompts = make_model("llama"), make_prompts(61, 80)
    cache = QuestCache(model.config, k=6, block_size=4, dense_layers=1)
    generate(model, prompts, cache, max_new_tokens=4)
    queries: dict[int, torch.Tensor] = {}

    def keep(module: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        queries[module.layer_idx] = query[:, :, 0]
        return AttentionInterface()["quest"](module, query, *arguments, **options)

    AttentionInterface.register("quest-kept", keep)
    AttentionMaskInterface.register("quest-kept", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("quest-kept")
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 4), value=1)
    positions = mask.sum(-1, keepdim=True) - 1
    step = {"input_ids": torch.ones(2, 1, dtype=torch.long), "position_ids": positions}

    def call(cache: QuestCache) -> torch.Tensor:
        logits: torch.Tensor = model(**step, attention_mask=mask, cache=cache).logits
        return logits

    poisoned, unread = copy.deepcopy(cache), copy.deepcopy(cache)
    expected = call(cache)
    assert cache.get_seq_length() == 84
    for i in (1, 2, 3):
        layer, sequences = cache.layers[i], cache._sequences
        lens = sequences.lens(84, torch.device("cpu"))
        assert lens.tolist() == [65, 84]
        selected = layer.decoder.select(queries[i], layer._tables, lens)
        assert selected.shape == (2, 2, 6)
        assert (selected >= 0).all()
        for b in range(2):
            for n in range(2):
                chosen = set(selected[b, n].tolist())
                assert chosen > {0, (int(lens[b]) - 1) // 4}
                for block in set(range(layer._columns)) - chosen:
                    physical = b * layer._columns + block
                    for pool in (poisoned.layers[i]._k_cache, poisoned.layers[i]._v_cache):
                        pool[physical, :, n] = float("nan")
                for pool in (unread.layers[i]._k_cache, unread.layers[i]._v_cache):
                    pool[b * layer._columns, :, n] = float("nan")  # the first is read
    assert torch.equal(call(poisoned), expected)
    assert call(unread).isnan().any()


def test_samples() -> None:
    model, prompts = make_model("qwen3"), make_prompts(40, 30)
    sampling = {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2}
    torch.manual_seed(3)
    expected = reference(model, prompts, **sampling)
    torch.manual_seed(3)
    assert_same(generate(model, prompts, QuestCache(model.config), **sampling), expected)
    options = {"block_size": 4, "k": 5, "recent_blocks": 1, "dense_layers": 1}
    torch.manual_seed(3)
    expected = from_scratch(model, prompts, options, **sampling)
    torch.manual_seed(3)
    assert_same(generate(model, prompts, QuestCache(model.config, **options), **sampling), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding"])
def test_beam_search(family: str) -> None:
    model, prompts = make_model(family), make_prompts(40, 30)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 40}
    expected = reference(model, prompts, **beams)
    for options in ({}, {"budget": 96, "dense_below": 0}):
        assert_same(
            generate(model, prompts, QuestCache(model.config, **options), **beams), expected
        )


def test_beam_search_from_scratch() -> None:
    model, prompts = make_model("llama"), make_prompts(40, 30)
    options = {"block_size": 4, "k": 5, "recent_blocks": 1, "dense_layers": 1}
    beams = {"num_beams": 3, "max_new_tokens": 30}
    expected = from_scratch(model, prompts, options, **beams)
    assert_same(generate(model, prompts, QuestCache(model.config, **options), **beams), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3-sliding"])
@pytest.mark.parametrize("kind", ["assistant", "prompt_lookup"])
def test_assisted_decoding(family: str, kind: str) -> None:
    model, prompts = make_model(family), make_prompts(40)
    prompts["input_ids"][:, 20:] = prompts["input_ids"][:, :20]  # something to look up
    if kind == "assistant":
        types = getattr(model.config, "layer_types", None)
        layers = {"num_hidden_layers": 2, "layer_types": types and types[:2]}
        helper = {"assistant_model": make_model(family, **layers)}
    else:
        helper = {"prompt_lookup_num_tokens": 4}
    expected = reference(model, prompts, max_new_tokens=60)
    cache = QuestCache(model.config, budget=112, dense_below=0)
    got = generate(model, prompts, cache, max_new_tokens=60, **helper)
    assert_same(got, expected)


@pytest.mark.parametrize("lengths", [(50,), (40, 9)], ids=str)
def test_prompt_in_chunks(lengths: tuple[int, ...]) -> None:
    """The first chunks are nothing but padding, of the shorter prompt even more of them."""
    model, prompts = make_model("llama"), make_prompts(*lengths)
    if len(lengths) > 1:
        prompts = {name: torch.nn.functional.pad(x, (10, 0)) for name, x in prompts.items()}
    expected = reference(model, prompts)
    for options in ({}, {"budget": 64, "dense_below": 0}):
        cache = QuestCache(model.config, **options)
        assert_same(generate(model, prompts, cache, prefill_chunk_size=7), expected)
    options = {"block_size": 4, "k": 4, "recent_blocks": 1, "dense_layers": 1}
    # The last chunk has one token, and so is a step.
    expected = from_scratch(model, prompts, options, prefill_chunk_size=7)
    cache = QuestCache(model.config, **options)
    assert_same(generate(model, prompts, cache, prefill_chunk_size=7), expected)


@pytest.mark.parametrize("lengths", [(40,), (40, 9)], ids=str)
def test_goes_on_with_the_same_cache(lengths: tuple[int, ...]) -> None:
    model, prompts = make_model("llama"), make_prompts(*lengths)
    options = {"block_size": 4, "k": 4, "recent_blocks": 1, "dense_layers": 1}
    cache = QuestCache(model.config, **options)
    first = generate(model, prompts, cache)
    added = make_prompts(*[30] * len(lengths))
    tokens = torch.cat([first.sequences, added["input_ids"]], 1)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 42), value=1)
    longer = {"input_ids": tokens, "attention_mask": mask}
    second = generate(model, longer, cache)

    QUEST.update(options)
    model.set_attn_implementation("quest-from-scratch")
    cache = DynamicCache(config=model.config)
    assert_same(first, generate(model, prompts, cache))
    assert_same(second, generate(model, longer, cache))


def test_other_sequences_after_reset() -> None:
    model = make_model("llama")
    cache = QuestCache(model.config, budget=64, dense_below=0)
    for lengths in ((40, 9), (20, 33), (33,), (45, 45)):
        prompts = make_prompts(*lengths)
        assert_same(generate(model, prompts, cache), reference(model, prompts))
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(40,), (40, 30)], ids=str)
def test_crop_and_choice_of_sequences(lengths: tuple[int, ...]) -> None:
    """Steps after them are those of a cache that never held anything else."""
    model, prompts = make_model("llama"), make_prompts(*lengths)
    options = {"block_size": 4, "k": 4, "dense_layers": 1}

    def filled(rows: list[int], tokens: int) -> QuestCache:
        cache = QuestCache(model.config, **options)
        model(**{name: x[rows, :tokens] for name, x in prompts.items()}, cache=cache)
        return cache

    def step(cache: QuestCache, rows: list[int]) -> torch.Tensor:
        done = cache.get_seq_length()
        logits = []
        for at in range(done, done + 7):
            mask = torch.nn.functional.pad(
                prompts["attention_mask"][rows, :done], (0, at + 1 - done), value=1
            )
            tokens = torch.full((len(rows), 1), at)
            position = {"position_ids": mask.sum(-1, keepdim=True) - 1}
            logits.append(
                model(input_ids=tokens, attention_mask=mask, cache=cache, **position).logits
            )
        return torch.cat(logits, 1)

    every = list(range(len(lengths)))
    cropped = filled(every, 40)
    cropped.crop(-9)
    torch.testing.assert_close(step(cropped, every), step(filled(every, 31), every))
    rows = [*every, *every]
    chosen = filled(every, 40)
    chosen.batch_repeat_interleave(2)
    chosen.reorder_cache(torch.tensor([0, 2] * 2 if len(lengths) > 1 else [0, 1]))
    torch.testing.assert_close(step(chosen, rows), step(filled(rows, 40), rows))
    chosen = filled(rows, 40)
    chosen.batch_select_indices(torch.arange(len(rows)) >= len(rows) - 1)
    torch.testing.assert_close(step(chosen, rows[-1:]), step(filled(rows[-1:], 40), rows[-1:]))


@pytest.mark.parametrize(
    ("max_length", "before", "after"),
    # The prompt has 15 blocks; 99 tokens in the end have 25.
    [(None, 18, 30), (30, 18, 30), (64, 16, 27), (500, 125, 125)],
)
def test_memory(max_length: int | None, before: int, after: int) -> None:
    """As much as is needed and a quarter, or what was asked for; padding needs none."""
    model, prompts = make_model("llama"), make_prompts(60, 20)
    options = {"block_size": 4, "k": 4, "recent_blocks": 1, "dense_layers": 2}
    cache = QuestCache(model.config, **options, max_length=max_length)
    generate(model, prompts, cache, max_new_tokens=2)
    assert {layer._columns for layer in cache.layers} == {before}
    cache.reset()
    got = generate(model, prompts, cache, max_new_tokens=40)
    assert_same(got, from_scratch(model, prompts, options, max_new_tokens=40))
    assert {layer._columns for layer in cache.layers} == {after}


@torch.no_grad()
def test_a_mask_does_not_outlive_its_call() -> None:
    """That of a long padded prompt is larger than all else."""
    model, prompts = make_model("llama"), make_prompts(60, 20)
    masks = []

    def watch(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        masks.append(weakref.ref(mask))
        return AttentionInterface()["quest"](module, query, key, value, mask, **options)

    AttentionInterface.register("quest-watched", watch)
    AttentionMaskInterface.register("quest-watched", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("quest-watched")
    cache = QuestCache(model.config)
    model(**prompts, cache=cache)
    assert [mask() for mask in masks] == [None] * 4


@torch.no_grad()
def test_steps_on_a_device_do_not_wait_for_it() -> None:
    """A meta tensor cannot be read, which a device's can, but the host would wait."""
    model, prompts = make_model("llama"), make_prompts(40, 30)
    cache = QuestCache(model.config)
    model(**prompts, cache=cache)
    sequences, first = cache._sequences, cache.layers[0]

    def see(new_tokens: int) -> None:
        mask = torch.ones(2, 1, new_tokens, 40 + new_tokens, dtype=torch.bool, device="meta")
        sequences.see(first, mask, 2, 40, 40 + new_tokens)

    with pytest.raises(NotImplementedError, match="with Meta tensors"):
        see(2)
    see(1)
    assert sequences.pads == [0, 10]
    assert sequences.lens(41, torch.device("cpu")).tolist() == [41, 31]
    with raises(ValueError, "expected the 2 sequences of the cache, got 3"):
        sequences.see(first, torch.ones(3, 1, 1, 41, dtype=torch.bool), 3, 40, 41)


def test_inference_mode() -> None:
    model, prompts = make_model("llama"), make_prompts(60, 20)
    options = {"block_size": 4, "k": 4, "recent_blocks": 1, "dense_layers": 1}
    with torch.inference_mode():
        got = generate(model, prompts, QuestCache(model.config, **options))
    assert_same(got, from_scratch(model, prompts, options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types_of_16_bits(dtype: torch.dtype) -> None:
    model, prompts = make_model("qwen3").to(dtype), make_prompts(60, 20)
    expected = reference(model, prompts, max_new_tokens=1)
    got = generate(model, prompts, QuestCache(model.config), max_new_tokens=1)
    assert_same(got, expected)
    # The first sparse step: later ones may select other blocks for a rounding.
    options = {"block_size": 4, "k": 5, "recent_blocks": 1, "dense_layers": 3}
    expected = from_scratch(model, prompts, options, max_new_tokens=2)
    got = generate(model, prompts, QuestCache(model.config, **options), max_new_tokens=2)
    assert torch.equal(got.sequences[:, :-1], expected.sequences[:, :-1])
    dense = reference(model, prompts, max_new_tokens=2)
    error = (got.logits[1] - expected.logits[1]).abs().max()
    assert error < 0.25 * (dense.logits[1] - expected.logits[1]).abs().max()


def test_without_a_quest_cache_it_is_sdpa() -> None:
    model, prompts = make_model("llama"), make_prompts(40, 30)
    expected = reference(model, prompts)
    assert_same(generate(model, prompts, DynamicCache(config=model.config)), expected)
    loss = model(**prompts, labels=prompts["input_ids"], use_cache=False).loss
    loss.backward()
    assert model.model.layers[3].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_needs_the_attention_function() -> None:
    model, prompts = make_model("llama", "sdpa"), make_prompts(20)
    cache = QuestCache(model.config)
    text = (
        "expected attention to take what the cache gave it in the last call: does the model have "
        'set_attn_implementation("quest")? If so, reset the cache'
    )
    with raises(RuntimeError, text):
        generate(model, prompts, cache)
    cache.reset()
    model.set_attn_implementation("quest")
    assert_same(generate(model, prompts, cache), reference(model, prompts))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": 64, "k": 4}, "expected either budget or k, got both"),
        ({"budget": 15}, "budget must be at least 16, got 15"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"recent_blocks": -1}, "recent_blocks must be at least 0, got -1"),
        ({"dense_layers": -1}, "dense_layers must be at least 0, got -1"),
        ({"dense_below": -1}, "dense_below must be at least 0, got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
    ],
)
def test_wrong_options(options: dict[str, int], text: str) -> None:
    with raises(ValueError, text):
        QuestCache(LlamaConfig(**TINY), **options)


@pytest.mark.parametrize("name", ["budget", "k", "block_size", "recent_blocks", "max_length"])
def test_options_of_other_types(name: str) -> None:
    with raises(TypeError, f"{name} must be an integer, got float"):
        QuestCache(LlamaConfig(**TINY), **{name: 16.5})


def test_wrong_models() -> None:
    config = MistralConfig(**TINY | {"sliding_window": 16})
    with raises(ValueError, "expected a layer without a sliding window, got none"):
        QuestCache(config)
    config = LlamaConfig(**TINY)
    config.layer_types = ["linear_attention"] * 4
    text = "layers must be full or sliding-window attention, got LinearAttentionLayer for layer 0"
    with raises(NotImplementedError, text):
        QuestCache(config)
    config = Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)
    text = "layers must be full or sliding-window attention, got DummyLayer for layer 2"
    with raises(NotImplementedError, text):
        QuestCache(config)
    text = "the model must be a decoder, got the encoder-decoder bart"
    with raises(NotImplementedError, text):
        QuestCache(BartConfig())


@torch.no_grad()
def test_wrong_masks() -> None:
    model, prompts = make_model("llama"), make_prompts(20, 12)
    cache = QuestCache(model.config)
    right = prompts | {"attention_mask": prompts["attention_mask"].flip(1)}
    text = "attention_mask must hide nothing but padding on the left of a sequence"
    with raises(NotImplementedError, text):
        model(**right, cache=cache)
    cache.reset()
    bias = prompts | {"attention_mask": torch.zeros(2, 1, 20, 20)}
    text = "attention_mask must be boolean [2, 1, *, 20], got torch.float32 [2, 1, 20, 20]"
    with raises(NotImplementedError, text):
        model(**bias, cache=cache)
    cache.reset()
    model(**prompts, cache=cache)
    step = {"input_ids": torch.ones(2, 1, dtype=torch.long), "cache": cache}
    text = "attention_mask must hide the padding of earlier calls, no more"
    with raises(ValueError, text):
        model(**step)
    with raises(ValueError, "expected the 2 sequences of the cache, got 1"):
        model(input_ids=torch.ones(1, 1, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_wrong_crops() -> None:
    model, prompts = make_model("llama"), make_prompts(20, 12)
    cache = QuestCache(model.config)
    cache.crop(0)
    model(**prompts, cache=cache)
    with raises(ValueError, "tokens_to_remove must not be positive, got 3"):
        cache.crop(3)
    with raises(ValueError, "tokens_to_remove must be at least -12, got -13"):
        cache.crop(-13)
    cache.crop(-12)
    assert cache.get_seq_length() == 8


def test_steps_have_no_gradients() -> None:
    model, prompts = make_model("llama"), make_prompts(20)
    cache = QuestCache(model.config)
    model(**prompts, cache=cache).logits.sum().backward()
    text = "decoding has no gradients and no dropout: use model.eval() and torch.no_grad()"
    with raises(NotImplementedError, text):
        model(input_ids=torch.ones(1, 1, dtype=torch.long), cache=cache)


def test_wrong_attention() -> None:
    """What a model of another family might do."""
    attention = AttentionInterface()["quest"]
    module = torch.nn.Module()
    keys = torch.randn(1, 2, 5, 16)
    values = torch.randn(1, 2, 5, 8)

    def attend(key: torch.Tensor, value: torch.Tensor, **options: Any) -> None:
        cache = QuestCache(LlamaConfig(**TINY))
        handed: dict[str, Any] = {}
        cache.update(keys, value, 0, kwargs=handed)
        attention(module, torch.randn(1, 4, 5, 16), key, value, None, **handed, **options)

    text = "keys must go from the cache to attention as they are, which this model changes"
    with raises(NotImplementedError, text):
        attend(keys * 2, keys)
    text = "values must have the shape of the keys, got [1, 2, 5, 8] and [1, 2, 5, 16]"
    with raises(NotImplementedError, text):
        attend(keys, values)
    for name in ("position_bias", "s_aux", "sinks", "softcap"):
        with raises(NotImplementedError, f"attention with {name} is not supported"):
            attend(keys, keys, **{name: 1.0})
    # Nor without a cache of ours, as in layers with a sliding window.
    for name in ("s_aux", "sinks", "softcap"):
        with raises(NotImplementedError, f"attention with {name} is not supported"):
            attention(module, torch.randn(1, 4, 5, 16), keys, keys, None, **{name: 1.0})
    text = "attention must pass its kwargs to cache.update, which this model's does not"
    with raises(NotImplementedError, text):
        QuestCache(LlamaConfig(**TINY)).update(keys, keys, 0)


@torch.no_grad()
def test_attention_sinks() -> None:
    """Transformers' sdpa would leave them out without a word."""
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
    model = GptOssForCausalLM(config).eval()
    model.set_attn_implementation("quest")
    for cache in (QuestCache(config), DynamicCache(config=config)):
        with raises(NotImplementedError, "attention with s_aux is not supported"):
            model(torch.arange(1, 9)[None], cache=cache)


def test_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import select_attn_ops.integrations\n"
        "import select_attn_ops.integrations.transformers\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    text = (
        "select_attn_ops.integrations.transformers needs torch and transformers >= 5.24: "
        "pip install torch 'transformers>=5.24,<6'"
    )
    assert result.stderr.endswith(f"ImportError: {text}\n")
    assert is_documented(text)


@pytest.mark.parametrize(
    "name",
    ["k", "budget", "block_size", "recent_blocks", "dense_layers", "dense_below", "max_length"],
)
def test_a_truth_value_is_no_integer(name: str) -> None:
    options: Any = {name: True}
    with raises(TypeError, f"{name} must be an integer, got bool"):
        QuestCache(LlamaConfig(**TINY), **options)


def test_a_call_after_one_that_failed_half_way() -> None:
    model, prompts = make_model("llama"), make_prompts(20)
    cache = QuestCache(model.config)
    token = prompts["input_ids"][:, :1]

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        model(prompts["input_ids"], cache=cache)
        hook = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(token, cache=cache)
        hook.remove()
        text = (
            "layers must hold equally many tokens, got 21 and 20: an earlier call did not end, "
            "reset the cache"
        )
        with raises(RuntimeError, text):
            model(token, cache=cache)
    cache.reset()
    assert_same(generate(model, prompts, cache), reference(model, prompts))


def test_a_cache_goes_to_another_model_after_a_reset() -> None:
    prompts = make_prompts(40)
    first, second = make_model("llama"), make_model("qwen3")
    cache = QuestCache(first.config)
    generate(first, prompts, cache)
    cache.reset()
    assert_same(generate(second, prompts, cache), reference(second, prompts))

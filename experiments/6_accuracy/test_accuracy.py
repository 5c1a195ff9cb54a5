"""Questions, the model that ships, simulated attention, and every summary against a plain loop."""

from __future__ import annotations

from pathlib import Path

import compare_summaries
import evaluate_accuracy
import explain_bounds
import gen_data_retrieval as data
import measures
import numpy as np
import pytest
import torch
import train_model
from evaluate_accuracy import are_right, continued, load_model, prefill
from measures import Summary
from select_attn_ops.integrations.transformers import QuestCache, register
from simulated_attention import Rule, Simulation, simulate
from transformers import LlamaForCausalLM

NUM_TOKENS = 1024


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, data.Tokenizer]:
    return load_model()


@pytest.fixture
def model(loaded: tuple[LlamaForCausalLM, data.Tokenizer]) -> LlamaForCausalLM:
    return loaded[0]


@pytest.fixture
def simulation(model: LlamaForCausalLM) -> Simulation:
    return simulate(model)


@pytest.fixture(scope="module")
def text(loaded: tuple[LlamaForCausalLM, data.Tokenizer]) -> np.ndarray:
    return data.read_tokens(loaded[1], data.default_text(), held_out=True)


def test_tokens_are_read_back(loaded: tuple[LlamaForCausalLM, data.Tokenizer]) -> None:
    tokenizer = loaded[1]
    for text in ("def f(self):\n    return 'é' * 3  # 知识\n", "\n@ab1234", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.pieces) == data.VOCAB_SIZE - 256
    assert len(tokenizer.encode("        return self")) < 5
    assert tokenizer.encode("@ab12").tolist() == list(b"@ab12")


def test_no_file_is_both_trained_on_and_held_out() -> None:
    trained = data.read_texts(data.default_text(), held_out=False)
    held_out = data.read_texts(data.default_text(), held_out=True)
    assert len(held_out) > 20
    shared = {text for text in trained if len(text) > 200} & set(held_out)
    assert not shared


def test_training_draws_other_questions() -> None:
    assert train_model.SEED not in evaluate_accuracy.SEEDS
    assert len(set(evaluate_accuracy.SEEDS)) == len(evaluate_accuracy.SEEDS) >= 3


@pytest.mark.parametrize("task", data.TASKS)
def test_text_answers_each_question_once(text: np.ndarray, task: str) -> None:
    drawn = data.gen_data_questions(text, task, 3, 8, NUM_TOKENS, seed=5)
    again = data.gen_data_questions(text, task, 3, 8, NUM_TOKENS, seed=5)
    other = data.gen_data_questions(text, task, 3, 8, NUM_TOKENS, seed=6)
    assert np.array_equal(drawn.contexts, again.contexts)
    assert not np.array_equal(drawn.contexts, other.contexts)
    assert drawn.questions.shape[1] == (1 if task == "passkey" else 8)
    for context, questions, places in zip(
        drawn.contexts, drawn.questions, drawn.positions, strict=True
    ):
        for question, place in zip(questions, places, strict=True):
            given = len(question) - drawn.answer_tokens
            assert np.array_equal(context[place - given :][: len(question)], question)
            assert 32 <= place < NUM_TOKENS - 96
            if task != "passage":
                found = np.lib.stride_tricks.sliding_window_view(context, given)
                assert (found == question[:given]).all(-1).sum() == 1


def test_answers_lie_anywhere(text: np.ndarray) -> None:
    places = [
        data.gen_data_questions(text, "pairs", 50, 4, NUM_TOKENS, seed=s).positions for s in (1, 2)
    ]
    counts, _ = np.histogram(np.concatenate(places), bins=8, range=(32, NUM_TOKENS - 96))
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.4 * counts.mean()


def test_training_texts_say_things_twice(text: np.ndarray) -> None:
    tokens, kinds = data.gen_data_training(text, 4, 512, np.random.default_rng(3))
    assert tokens.shape == kinds.shape == (4, 512)
    for row, kind in zip(tokens, kinds, strict=True):
        for at in np.flatnonzero((kind[1:] == data.PAIR) & (kind[:-1] != data.PAIR)) + 1:
            line = row[at - data.PAIR_TOKENS + data.VALUE_DIGITS : at + data.VALUE_DIGITS]
            seen = np.lib.stride_tricks.sliding_window_view(row[:at], len(line))
            assert (seen == line).all(-1).any()


def test_training_is_deterministic_and_learns(text: np.ndarray) -> None:
    curriculum = (train_model.Stage(64, 8, 25, 2e-3, 1e-3),)
    (first, history), (second, _) = (
        train_model.train(text, curriculum, seed=1, log_every=0) for _ in range(2)
    )
    assert np.mean(history[-5:]) < 0.8 * np.mean(history[:5])
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_heads_of_another_size_begin_with_the_tokens_before(text: np.ndarray) -> None:
    model = train_model.new_model(1, head_dim=64)
    simulation = simulate(model)
    cache = prefill(model, simulation, text[:200])
    simulation.keep = True
    continued(model, simulation, cache, text[None, 200:210], Rule("dense"))
    query, key = simulation.seen[0]
    assert query.shape[-1] == 64
    weights = measures.token_weights(query, key)[0].flatten(0, 1)  # [H, S, L]
    last = torch.arange(200, 210)
    for head, back in enumerate(range(1, 5)):
        assert (weights[head].argmax(-1) == last - back).float().mean() > 0.5


def test_model_is_small(model: LlamaForCausalLM) -> None:
    assert 5e5 <= model.num_parameters() <= 5e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_shipped_model_finds_what_recent_blocks_do_not_hold(
    model: LlamaForCausalLM, simulation: Simulation, text: np.ndarray
) -> None:
    drawn = data.gen_data_questions(text, "pairs", 3, 12, NUM_TOKENS, seed=7)
    rules = [Rule("dense")] + [Rule(kind, 8) for kind in ("quest", "recent")]
    dense, quest, recent = evaluate_accuracy.count_right(model, simulation, drawn, rules).sum(1)
    assert dense >= 0.8 * 36
    assert recent <= 0.2 * 36
    assert quest > recent


def test_simulated_dense_is_sdpa(
    model: LlamaForCausalLM, simulation: Simulation, text: np.ndarray
) -> None:
    tokens = text[:700]
    cache = prefill(model, simulation, tokens[:600])
    actual = continued(model, simulation, cache, tokens[None, 600:], Rule("dense"))
    everything = continued(model, simulation, cache, tokens[None, 600:], Rule("summary", 44))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[:, 600:]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(everything, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_simulated_quest_is_the_operators_and_quest_cache(
    model: LlamaForCausalLM, simulation: Simulation, text: np.ndarray, block_size: int, k: int
) -> None:
    tokens = text[1000:1560]
    cache = prefill(model, simulation, tokens[:520])
    expected = continued(model, simulation, cache, tokens[None, 520:], Rule("quest", k, block_size))
    rule = Rule("summary", k, block_size)
    actual = continued(model, simulation, cache, tokens[None, 520:], rule)
    register()
    model.set_attn_implementation("quest")
    quest = QuestCache(model.config, k=k, block_size=block_size, dense_layers=0)
    inputs = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        model(inputs[:, :520], cache=quest)
        steps = [model(inputs[:, i : i + 1], cache=quest) for i in range(520, 560)]
    by_cache = torch.cat([step.logits for step in steps], 1)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(by_cache, expected, rtol=1e-3, atol=1e-3)


def test_same_answers_as_generate(
    model: LlamaForCausalLM, simulation: Simulation, text: np.ndarray
) -> None:
    drawn = data.gen_data_questions(text, "pairs", 1, 8, NUM_TOKENS, seed=11)
    cache = prefill(model, simulation, drawn.contexts[0])
    logits = continued(model, simulation, cache, drawn.questions[0], Rule("quest", 8))
    right = are_right(logits, drawn.questions[0], data.VALUE_DIGITS)
    register()
    model.set_attn_implementation("quest")
    context = torch.from_numpy(drawn.contexts[0])[None]
    for question, expected in zip(torch.from_numpy(drawn.questions[0]), right, strict=True):
        quest = QuestCache(model.config, k=8, dense_layers=0)
        given = question[None, : -data.VALUE_DIGITS]
        with torch.no_grad():
            model(context, cache=quest)
            for i in range(given.shape[1] - 1):
                model(given[:, i : i + 1], cache=quest)
        everything = torch.cat([context, given], 1)
        tokens = model.generate(
            everything,
            cache=quest,
            max_new_tokens=data.VALUE_DIGITS,
            do_sample=False,
            pad_token_id=0,
        )
        answer = tokens[0, everything.shape[1] :]
        assert bool((answer == question[-data.VALUE_DIGITS :]).all()) == bool(expected)


def _random_keys(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Query ``[2, 4, 3, 8]`` and key ``[2, 2, 67, 8]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    return query, torch.randn(2, 2, 67, 8, generator=generator, dtype=torch.float64) * 2


SUMMARIES = [
    Summary("minmax"),
    Summary("minmax", 2, "max", group="max"),
    Summary("minmax", 4, "lse", group="mean"),
    Summary("mean"),
    Summary("mean", 4, "lse", group="max"),
    Summary("mean", 2, "max", group="mean"),
    Summary("deviation", c=2.0),
    Summary("deviation", 8, "lse", c=4.0, group="mean"),
]


@pytest.mark.parametrize("summary", SUMMARIES, ids=lambda s: s.name)
def test_scores_match_a_loop(summary: Summary) -> None:
    query, key = _random_keys()
    scores = measures.block_scores(query, key, 16, summary)
    size = 16 // summary.parts
    for b, n, s, t in np.ndindex(2, 2, 3, 4):  # full blocks
        heads = query[b, 2 * n : 2 * n + 2, s]
        if summary.group == "query":
            heads = heads.mean(0, keepdim=True)
        by_head = []
        for q in heads:
            parts = []
            for part in range(summary.parts):
                start = 16 * t + part * size
                keys = key[b, n, start : start + size]
                if summary.kind == "minmax":
                    bounds = torch.stack([q * keys.amax(0), q * keys.amin(0)])
                    score = bounds.amax(0).sum()
                else:
                    score = q @ keys.mean(0)
                    if summary.kind == "deviation":
                        spread = ((q * (keys - keys.mean(0))) ** 2).mean(0).sum().sqrt()
                        score = score + summary.c * spread
                parts.append(score / 8**0.5)
            together = torch.stack(parts)
            by_head.append(together.amax() if summary.combine == "max" else together.logsumexp(0))
        heads = torch.stack(by_head)
        expected = heads.amax() if summary.group == "max" else heads.mean()
        torch.testing.assert_close(scores[b, n, s, t], expected)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("parts", [1, 4])
def test_bounds_stay_bounds(bits: int, parts: int) -> None:
    query, key = _random_keys(1)
    query, key = query.float(), key.float()
    scores = measures.block_scores(query, key, 16, Summary("minmax", parts, bits=bits))
    grouped = query.unflatten(1, (2, 2)).mean(2)
    exact = (grouped @ key.mT / 8**0.5)[..., :64].unflatten(-1, (4, 16)).amax(-1)
    assert (scores[..., :4] >= exact - 1e-5).all()


@pytest.mark.parametrize(("bits", "error"), [(16, 2**-8), (8, 1 / 200), (4, 1 / 12)])
def test_rounding(bits: int, error: float) -> None:
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    rows[0] = 0
    largest = rows.abs().amax(-1, keepdim=True)
    nearest, up, down = (measures.rounded_rows(rows, bits, way) for way in (0, 1, -1))
    assert ((nearest - rows).abs() <= error * largest).all()
    assert (up >= rows).all()
    assert (down <= rows).all()
    assert ((up - down).abs() <= 2.1 * error * largest + 1e-6).all()


def test_an_offset_of_all_keys_ranks_blocks_alike() -> None:
    query, key = _random_keys(5)
    offset = torch.randn(8, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 5
    scores, moved = (measures.block_scores(query, k, 16, Summary()) for k in (key, key + offset))
    same = query.unflatten(1, (2, 2)).mean(2) @ offset / 8**0.5
    torch.testing.assert_close(moved, scores + same[..., None])


def test_keys_before_positions(model: LlamaForCausalLM) -> None:
    theta = model.config.rope_parameters["rope_theta"]
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(1, 1, 64, 32, generator=generator, dtype=torch.float64)
    positions = torch.arange(64)
    rotated = measures.rotate(key, positions, theta)
    torch.testing.assert_close(measures.rotate(rotated, -positions, theta), key)
    cos, sin = model.model.rotary_emb(key, positions[None])
    expected = key * cos + torch.cat([-key[..., 16:], key[..., :16]], -1) * sin
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)
    # Blocks of one token: the middle is the token.
    query = torch.randn(1, 2, 4, 32, generator=generator, dtype=torch.float64)
    expected = measures.block_scores(query, rotated, 1, Summary("mean"), theta)
    actual = measures.block_scores(query, rotated, 1, Summary("mean", keys="middle"), theta)
    torch.testing.assert_close(actual, expected)
    plain = measures.block_scores(query, rotated, 1, Summary("mean", keys="plain"), theta)
    unrotated = measures.rotate(query, -torch.arange(60, 64), theta).mean(1)
    torch.testing.assert_close(plain[0, 0], unrotated[0] @ key[0, 0].mT / 32**0.5)


def test_forced_blocks_and_order() -> None:
    scores = torch.tensor([5.0, 1.0, 9.0, 2.0, 7.0]).expand(1, 1, 3, 5)
    # Positions 62 to 64, in blocks of 16: 3 full and one filling, 4 full, 4 full and one filling.
    ranked = measures.ranks(scores, 65, 16)[0, 0]
    order = [[3, 2, 0, 1], [3, 0, 2, 1], [4, 3, 0, 2, 1]]
    for row, expected in zip(ranked, order, strict=True):
        assert row.argsort(descending=True)[: len(expected)].tolist() == expected
    assert measures.top_blocks(ranked, 9).sum(-1).tolist() == [4, 4, 5]
    assert measures.top_blocks(ranked, 2).sum(-1).tolist() == [2, 2, 2]


def test_exact_scores_hold_the_most() -> None:
    query, key = _random_keys(4)
    masses = measures.block_masses(query, key, 16)
    torch.testing.assert_close(masses.sum(-1), torch.ones(2, 2, 2, 3, dtype=torch.float64))
    best = measures.top_blocks(masses.mean(2), 2)
    for first in range(5):
        for second in range(first):
            chosen = torch.zeros(2, 2, 3, 5, dtype=torch.bool)
            chosen[..., [first, second]] = True
            worse = measures.held(masses, chosen).mean(2)
            assert (measures.held(masses, best).mean(2) >= worse - 1e-12).all()
    ranked = masses.mean(2)
    assert (measures.recall(best, best, ranked) == 1).all()
    assert measures.recall(best, best, torch.full_like(ranked, 2e30)).isnan().all()


def test_bytes_of_summaries() -> None:
    assert Summary("minmax", bits=16).nbytes(128) == 512
    assert Summary("mean", bits=8).nbytes(128) == 130
    assert Summary("mean", 4, "lse", bits=4).nbytes(128) == 4 * 66
    assert Summary("deviation", 2, bits=4).nbytes(32) == 4 * 18


def test_what_bounds_add_to_dot_products() -> None:
    query, key = _random_keys(7)
    answers = torch.tensor([[21], [37]])
    layer = explain_bounds.look_at(query, key, answers, 2, 16, 1e4)
    # The one step that answers is at position 65: blocks 1 and 2 are not forced, 3 is the newest.
    for head in range(2):
        lead, excess, excess_answer = [], [], []
        for text, (right, other) in enumerate(((1, 2), (2, 1))):
            q = query[text, 2 * head : 2 * head + 2, 1].mean(0)
            blocks = key[text, head, :64].unflatten(0, (4, 16))
            bounds = torch.maximum(q * blocks.amax(1), q * blocks.amin(1)).sum(-1) / 8**0.5
            largest = (blocks @ q).amax(-1) / 8**0.5
            lead.append(bounds[right] - bounds[other])
            excess.append((bounds - largest)[other])
            excess_answer.append((bounds - largest)[right])
        for what, values in (
            (layer.lead, lead),
            (layer.excess, excess),
            (layer.excess_answer, excess_answer),
        ):
            expected = torch.stack(values).mean()
            torch.testing.assert_close(what[explain_bounds.QUEST][head], expected)
    # Both blocks of the budget are forced.
    assert all((found == 0).all() for found in layer.found.values())
    layer = explain_bounds.look_at(query, key, answers, 5, 16, 1e4)
    assert all((found == 1).all() for found in layer.found.values())


@pytest.mark.parametrize("block_size", [5, 12, 16])
def test_explained_sub_blocks_are_whole(block_size: int) -> None:
    parts = [each.parts for each in explain_bounds.all_summaries(block_size).values()]
    assert all(block_size % count == 0 for count in parts)


def test_wilson_interval() -> None:
    low, high = measures.wilson(95, 100)
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)
    assert measures.wilson(10, 10)[1] == pytest.approx(1)


def test_evaluation_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "accuracy.json"
    evaluation = evaluate_accuracy.main(["--quick", f"--output={output}", "--block-sizes", "16"])
    printed = capsys.readouterr().out
    assert "pairs, blocks of 16: accuracy" in printed
    assert output.is_file()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for rows in evaluation.masses.values():
        best = {row["k"]: np.mean(row["held"]) for row in rows if row["rule"] == "exact"}
        for row in rows:
            assert np.mean(row["held"]) <= best[row["k"]] + 1e-6
            assert np.shape(row["held"]) == (3, 4)
            assert np.shape(row["recall"]) == (3, 2)


def test_summaries_of_features_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "summaries.json"
    found = compare_summaries.main(["--quick", f"--output={output}", "--on", "features"])
    rows, limits = found["features"]
    by_name = {row.name: row for row in rows}
    assert by_name["minmax 16b query"].nbytes == 512
    assert all(0 < row.mass <= limits["exact_mass"] + 1e-6 for row in rows)
    assert not any(row.summary["keys"] != "rotated" or row.right for row in rows)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_summaries_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "summaries.json"
    found = compare_summaries.main(["--quick", f"--output={output}", "--on", "model"])
    rows, limits = found["model"]
    by_name = {row.name: row for row in rows}
    assert len(by_name) == len(rows)
    assert by_name["minmax 16b query"].nbytes == 128
    assert all(row.mass <= limits["exact_mass"] + 1e-6 for row in rows)
    edge = compare_summaries.frontier(rows, lambda row: row.mass)
    assert [row.nbytes for row in edge] == sorted(row.nbytes for row in edge)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_explanation_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    found = explain_bounds.main(["--quick"])
    printed = capsys.readouterr().out
    assert "8 blocks of 16, 4 questions" in printed
    assert found.right["dense"] >= 3
    assert found.attention(1).min() > 0.5
    for name in ("bounds (Quest)", "bounds of 4 sub-blocks"):
        assert (found.mean(1, "excess", name) > 0).all()
    at_large = found.mean(1, "excess", explain_bounds.QUEST)
    assert (found.mean(1, "excess", "bounds of 4 sub-blocks") < at_large).all()
    assert (found.mean(1, "found", explain_bounds.LARGEST) >= 0.8).all()

"""The lines of the table of speed that compare times with each other, not with the ceiling."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .. import QuestDecoder, runtime
from .alternatives import attend_densely
from .cases import SELECT, Shape, Spec, WrongResultError, build
from .measuring import Contender, Turns, by_turn, interleave
from .runner import Result, Runner
from .stopwatch import Laps

_K = 1 << 10


@dataclass(frozen=True)
class Finding:
    """A figure of the table of speed."""

    label: str
    what: str
    value: float | None
    """None where it cannot be told; the note says why."""
    limit: float
    """What it should be at most."""
    unit: str = ""
    note: str = ""


def top_k(runner: Runner) -> list[Finding]:
    """Selecting the best 64 of 8192 scores, as a share of computing them."""
    shape = Shape(SELECT, (8192 * 16,), num_heads=4, num_kv_heads=1, block_size=16, k=64)
    case = runner.build(Spec(shape))
    shares = []
    with runner.setting(threads=1):
        case.check()
        for number in range(_repeats(runner, 100)):
            laps = Laps.of(case.calls[number % len(case.calls)])
            if laps.scoring > 0:
                shares.append(laps.selection / laps.scoring)
    found = Finding("line 6", "top 64 of 8192 scores, over the time of scoring them", None, 0.1)
    if not shares:
        return [replace(found, note="the kernel does not time its passes")]
    return [replace(found, value=statistics.median(shares))]


def call_overhead(runner: Runner) -> list[Finding]:
    """What a call of the Python function costs beside the C++ call, and that beside the kernel."""
    shape = Shape(SELECT, (16 * _K,))
    case = build(Spec(shape), runner.device, 0)
    call = case.calls[0]
    python, cpp = [], []
    with runner.setting():
        case.check()
        for _ in range(_repeats(runner, 2000)):
            laps = Laps.of(call)
            python.append(laps.python - laps.call)
            cpp.append(laps.call - laps.kernel)
    texts = ("Python call over C++ call", "C++ call over the kernel")
    return [
        Finding("line 7", f"{text}, B=1, 16k tokens", statistics.median(times) / 1e3, limit, "us")
        for text, times, limit in zip(texts, (python, cpp), (5.0, 1.0), strict=True)
    ]


def linearity(runner: Runner) -> list[Finding]:
    """The time of a long request over that of a shorter one, per token."""
    short, long = (16 * _K, 128 * _K) if runner.effort.small else (128 * _K, 1024 * _K)
    cases = [
        build(Spec(Shape(SELECT, (tokens,), rows=64)), runner.device, runner.rotated_bytes)
        for tokens in (short, long)
    ]
    with runner.setting():
        for case in cases:
            case.check()
        contenders = [Contender(by_turn(case.calls), runner.simd_target) for case in cases]
        turns = Turns(max(len(case.calls) for case in cases))
        (short_times, long_times), _ = interleave(runner.clock, contenders, turns, runner.effort)
    ratios = [b / a / (long / short) for a, b in zip(short_times, long_times, strict=True)]
    what = f"time of {long // _K}k tokens over {long // short} times that of {short // _K}k"
    return [Finding("line 8", what, statistics.median(ratios), 1.1)]


def between_torch(runner: Runner) -> list[Finding]:
    """The time of a call between torch operators on all cores over that of the call alone."""
    found = []
    for way, limit in (("openmp", 1.1), ("pool", 1.5)):
        finding = Finding("line 9", f"call after a matmul over alone, threads: {way}", None, limit)
        command = [sys.executable, "-m", __name__, "small" if runner.effort.small else "large"]
        environment = os.environ | {
            "SELECT_ATTN_PARALLEL": way,
            "SELECT_ATTN_NUM_THREADS": str(runner.threads),
            "SELECT_ATTN_SIMD_TARGET": runner.simd_target,
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            finding = replace(finding, value=json.loads(done.stdout))
        else:
            lines = done.stderr.strip().splitlines() or ["it failed without a word"]
            finding = replace(finding, note=lines[-1])
        found.append(finding)
    return found


def _between_torch_here(batch: int, rounds: int) -> float:
    """The ratio of `between_torch` with the threads that this process is set to use."""
    case = build(Spec(Shape(SELECT, (64 * _K,) * batch)), torch.device("cpu"), 1 << 27)
    torch.set_num_threads(runtime.get_num_threads())
    matrix = torch.randn(768, 768)
    turns = Turns(len(case.calls))
    case.check()

    def seconds() -> float:
        call = case.calls[turns.next()]
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    ratios = []
    for _ in range(rounds):
        time.sleep(0.02)  # torch's threads fall asleep
        seconds()  # wakes the library's
        alone = [seconds() for _ in range(5)]
        torch.mm(matrix, matrix)
        seconds()
        between = []
        for _ in range(5):
            torch.mm(matrix, matrix)
            between.append(seconds())
        ratios.append(statistics.median(between) / statistics.median(alone))
    return statistics.median(ratios)


@dataclass(frozen=True)
class DecodeStep:
    """One request of a decoding engine, its cache in blocks and in one piece."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    """``[1, N, tokens, D]``."""
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    every_block: torch.Tensor
    decoder: QuestDecoder

    HEADS, KV_HEADS, DIM, BLOCK, K = 32, 8, 128, 128, 16

    @classmethod
    def rotated(cls, tokens: int, runner: Runner) -> list[DecodeStep]:
        """Make so many that they do not stay in the last cache from one turn to the next."""
        size = 4 * tokens * cls.KV_HEADS * cls.DIM
        return [cls.of(tokens, seed) for seed in range(max(runner.rotated_bytes // size, 1))]

    @classmethod
    def of(cls, tokens: int, seed: int = 0) -> DecodeStep:
        """Make one of random keys and values, in bfloat16."""
        blocks = tokens // cls.BLOCK
        generator = torch.Generator().manual_seed(seed)
        tile = torch.randn(1_000_003, generator=generator).bfloat16()
        keys, values = (
            tile.roll(shift)
            .repeat(-(-tokens * cls.KV_HEADS * cls.DIM // len(tile)))[
                : tokens * cls.KV_HEADS * cls.DIM
            ]
            .view(1, cls.KV_HEADS, tokens, cls.DIM)
            for shift in (0, 77)
        )
        places = torch.randperm(blocks, generator=generator)

        def paged(dense: torch.Tensor) -> torch.Tensor:
            pool = torch.empty(blocks, cls.BLOCK, cls.KV_HEADS, cls.DIM, dtype=dense.dtype)
            for j, place in enumerate(places.tolist()):
                pool[place] = dense[0, :, j * cls.BLOCK : (j + 1) * cls.BLOCK].transpose(0, 1)
            return pool

        every_block = torch.arange(blocks, dtype=torch.int32).expand(1, cls.KV_HEADS, blocks)
        decoder = QuestDecoder(
            paged(keys),
            paged(values),
            num_heads=cls.HEADS,
            k=cls.K,
            max_batch=1,
            max_blocks=blocks,
            dense_below=tokens,  # taken where a max_seq_len is given
        )
        step = cls(
            torch.randn(1, cls.HEADS, cls.DIM, generator=generator).bfloat16(),
            keys,
            values,
            places.int()[None],
            torch.tensor([tokens], dtype=torch.int32),
            every_block.contiguous(),
            decoder,
        )
        decoder.prefill(step.block_tables, step.seq_lens)
        return step

    def sparse(self) -> torch.Tensor:
        """Update the last block's metadata, select blocks and attend to them."""
        return self.decoder.step(self.query, self.block_tables, self.seq_lens)

    def dense_path(self) -> torch.Tensor:
        """Update the last block's metadata, and attend to all blocks."""
        tokens = self.keys.shape[2]
        return self.decoder.step(self.query, self.block_tables, self.seq_lens, max_seq_len=tokens)

    def dense(self) -> torch.Tensor:
        """Attend to all blocks by the same kernel."""
        decoder = self.decoder
        return decoder.attend(self.query, self.block_tables, self.seq_lens, self.every_block)

    def torch_dense(self) -> torch.Tensor:
        """Attend to all tokens by torch, keys and values in one piece."""
        return attend_densely(self.query, self.keys, self.values)

    def check(self) -> None:
        """Compare with torch's attention, over everything and over what is selected."""
        chosen = self.decoder.select(self.query, self.block_tables, self.seq_lens)[0]
        numbers = (chosen[:, :, None] * self.BLOCK + torch.arange(self.BLOCK)).flatten(1)
        places = numbers.long()[None, :, :, None].expand(-1, -1, -1, self.DIM)
        selected = (part.gather(2, places) for part in (self.keys, self.values))
        for way, expected in (
            (self.dense, self.torch_dense()),
            (self.dense_path, self.torch_dense()),
            (self.sparse, attend_densely(self.query, *selected)),
        ):
            actual = way()  # a buffer of the decoder, until the next one
            if not torch.allclose(actual.float(), expected.float(), rtol=0.03, atol=0.003):
                raise WrongResultError("out is not the reference's")


def decode_step(runner: Runner) -> list[Finding]:
    """A whole step over attention to every block, and over torch's on a contiguous cache."""
    found = []
    small = runner.effort.small
    for tokens, limit in [(4 * _K, 1)] if small else [(32 * _K, 8), (128 * _K, 25), (512 * _K, 50)]:
        steps = DecodeStep.rotated(tokens, runner)
        ways = (DecodeStep.sparse, DecodeStep.dense, DecodeStep.torch_dense)
        others = ("attention to every block", "torch's, cache contiguous")
        for name, ratio in zip(others, _ratios(runner, steps, ways), strict=True):
            what = f"step (update, select, attend) over {name}, {tokens // _K}k tokens"
            found.append(Finding("line 12", what, ratio, 1 / limit))
    return found


def crossover(runner: Runner) -> list[Finding]:
    """Where selecting begins to pay: a step over one that takes the dense path."""
    found = []
    budget = DecodeStep.K * DecodeStep.BLOCK
    for share in [1.5] if runner.effort.small else [1.25, 1.5, 2.0]:
        tokens = int(share * budget)
        steps = DecodeStep.rotated(tokens, runner)
        (ratio,) = _ratios(runner, steps, (DecodeStep.sparse, DecodeStep.dense_path))
        what = f"step over the dense path, {tokens} tokens ({share:g} times the budget)"
        found.append(Finding("line 13", what, ratio, 1.0))
    return found


def _ratios(
    runner: Runner,
    steps: Sequence[DecodeStep],
    ways: Sequence[Callable[[DecodeStep], object]],
) -> list[float]:
    """Time of the first way to make a step over each other one's, medians of rounds."""
    with runner.setting():
        steps[0].check()
        contenders = [
            Contender(by_turn([functools.partial(way, step) for step in steps]), runner.simd_target)
            for way in ways
        ]
        turns = Turns(len(steps))
        (times, *others), _ = interleave(runner.clock, contenders, turns, runner.effort)
    return [
        statistics.median(own / dense for own, dense in zip(times, other, strict=True))
        for other in others
    ]


def beside_alternatives(results: Sequence[Result]) -> list[Finding]:
    """The time of an operator over that of the fastest alternative, where it is worst."""
    ratios = []
    missing: dict[str, int] = {}
    for result in results:
        for name in result.skipped:
            missing[name] = missing.get(name, 0) + 1
        best = result.best_alternative
        if best is not None:
            ratio = result.seconds.median / result.alternatives[best]
            what = f"{best}; {result.operator}, {result.dtype}, {result.shape}"
            ratios.append((ratio, what))
    if not ratios:
        return []
    slower = sum(ratio > 1 for ratio, _ in ratios)
    ratio, what = max(ratios)
    notes = [f"slower in {slower} of {len(ratios)} cases", f"here beside {what}"]
    notes += [f"no {name} in {count} cases" for name, count in missing.items()]
    text = "time over that of the fastest alternative, where it is worst"
    return [Finding("gpu 7", text, ratio, 1.0, note="; ".join(notes))]


def _repeats(runner: Runner, usual: int) -> int:
    return min(usual, 20) if runner.effort.small else usual


COMPARISONS: dict[str, Callable[[Runner], list[Finding]]] = {
    "line 6: top-k beside scoring": top_k,
    "line 7: overhead of a call": call_overhead,
    "line 8: long beside longer": linearity,
    "line 9: between torch operators": between_torch,
    "line 12: decode step": decode_step,
    "line 13: crossover": crossover,
}
"""By the name that ``--filter`` looks at."""


if __name__ == "__main__":  # a process of its own, for `between_torch`
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        # With real-time priority torch's threads, which spin, would not let the pool's run.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    _small = sys.argv[1:] == ["small"]
    print(json.dumps(_between_torch_here(*((1, 2) if _small else (32, 20)))))

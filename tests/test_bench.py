"""The benchmark: that it measures the right thing and says so. No test here depends on a speed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_attn_ops import __main__ as command_line
from select_attn_ops import (
    bench,
    paged_select_attention,
    quest_block_select_paged,
    runtime,
    set_num_threads,
)
from select_attn_ops._library import LIB
from select_attn_ops.bench import (
    alternatives,
    cases,
    ceiling,
    command,
    comparisons,
    device_ceiling,
    graphs,
    report,
    runner,
    spans,
    suites,
)
from select_attn_ops.bench.cases import ATTEND, PREFILL, SELECT, TABLES, Shape, Spec
from select_attn_ops.bench.measuring import (
    QUICK,
    Clock,
    Contender,
    Spread,
    Turns,
    interleave,
    last_cache_bytes,
)
from select_attn_ops.bench.profile import parts_of_a_call
from select_attn_ops.bench.stopwatch import Laps, without_arithmetic
from select_attn_ops.bench.suites import SUITES, quick

CPU = torch.device("cpu")
SMALL = ["--quick", "--suite", "context"]


# All there are, with a gap behind every row.
WAYS = ceiling.ways_to_read([torch.zeros(2, 2, 64)[..., :32]] * 2)


# --- the reader


@st.composite
def strided_bytes(draw: st.DrawFn) -> torch.Tensor:
    """Zeros in any strides that reduce to two levels of rows, ones in all gaps."""
    dims = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 7)) for _ in range(dims)]
    shape[-1] = draw(st.sampled_from([1, 2, 31, 64, 100, 256, 700]))
    strides, running = [0] * dims, 1
    for dim in reversed(range(dims)):
        strides[dim] = running
        running = running * shape[dim] + draw(st.sampled_from([0, 0, 1, 64, 192]))
    offset = draw(st.integers(0, 70))
    flat = torch.full((offset + running,), 0xFF, dtype=torch.uint8)
    tensor = flat.as_strided(shape, strides, offset)
    tensor.zero_()
    return tensor.permute(*draw(st.permutations(range(dims))))


@given(data=st.data(), tensor=strided_bytes())
@settings(max_examples=300)
def test_reader_reads_every_byte_and_no_gap(data: st.DataObject, tensor: torch.Tensor) -> None:
    runtime.set_simd_target(data.draw(st.sampled_from(runtime.simd_targets())))
    set_num_threads(data.draw(st.integers(1, 4)))
    streams = data.draw(st.sampled_from([1, 2, 4, 8]))
    prefetch = data.draw(st.sampled_from([0, 64, 1000]))
    chunk = data.draw(st.sampled_from([0, 1, 100, 4096]))
    far_prefetch = data.draw(st.sampled_from([0, 3000]))
    options = (streams, prefetch, far_prefetch, chunk, False)
    assert LIB.read_memory(tensor, None, None, *options) == 0
    at = tuple(data.draw(st.integers(0, size - 1)) for size in tensor.shape)
    bit = 1 << data.draw(st.integers(0, 7))
    tensor[at] = bit
    assert LIB.read_memory(tensor, None, None, *options) == bit
    nothing = torch.zeros(1000, dtype=torch.uint8)
    assert LIB.read_memory(nothing, tensor, nothing, *options) == bit
    assert LIB.read_memory(nothing, nothing, tensor, *options) == bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "way", ceiling.ways_to_read([torch.zeros(2, 2, 64)[..., :32]] * 2), ids=str
)
def test_every_way_to_read(way: ceiling.Way, dtype: torch.dtype) -> None:
    pools = torch.zeros(2, 64, 2, 300, dtype=dtype)
    tensors = [pool[..., :256] for pool in pools]
    contender = ceiling.reader([tensors], way)
    runtime.set_simd_target(way.simd_target)
    assert contender.call(0) == 0
    for tensor in tensors:
        for at in ((0, 0, 0), (31, 1, 255), (63, 1, 255)):
            tensor[at] = -0.0  # one bit, the highest of a byte
            assert contender.call(0) == 0x80
            tensor[at] = 0


def test_touched_bytes() -> None:
    dense = torch.zeros(4, 8, 16)
    assert spans.touched_bytes(dense) == dense.nbytes
    assert spans.touched_bytes(dense.transpose(0, 1)) == dense.nbytes
    halves = torch.zeros(4, 8, 32)
    assert halves.data_ptr() % 64 == 0
    assert spans.touched_bytes(halves[..., :16]) == 4 * 8 * 64
    assert spans.touched_bytes(halves[..., 1:16]) == 4 * 8 * 64
    assert spans.touched_bytes(halves[..., 8:24]) == 4 * 8 * 128
    # Rows of 8 bytes every 16: four rows share a line.
    assert spans.touched_bytes(torch.zeros(64, 4)[:, :2]) == 64 * 16
    assert spans.touched_bytes(halves[:, 2:4]) == 4 * 2 * 128
    assert spans.touched_bytes(halves[:, 2:4, :16]) == 4 * 2 * 64


def test_ways_cover_what_a_ceiling_must() -> None:
    """Streams, with and without prefetch, two vector widths, and max and min side by side."""
    ways = ceiling.ways_to_read([torch.zeros(4, 64)] * 2)
    targets = [target for target in runtime.simd_targets() if target != "SCALAR"][:2]
    for target in targets:
        for streams in (1, 2, 4, 8):
            mine = [w for w in ways if (w.simd_target, w.streams) == (target, streams)]
            assert {bool(w.prefetch_bytes) for w in mine} == {False, True}
            assert {w.chunk_bytes for w in mine} >= {0, 1 << 20, 1 << 18, 1 << 16}
            assert streams == 1 or any(w.side_by_side for w in mine)
    assert not any(w.with_gaps for w in ways)
    assert not any(
        w.side_by_side for w in ceiling.ways_to_read([torch.zeros(4, 64), torch.zeros(64)])
    )


def test_ceiling_narrows_down_to_three_ways() -> None:
    tensors = [torch.ones(1 << 14), torch.ones(1 << 14)]
    finder = ceiling.Ceiling(Clock(CPU))
    assert len(finder.best([tensors])) == 3
    assert len({way for way, _ in finder.best([tensors])}) == 3  # now among what it remembers


def test_ceiling_tries_every_way_for_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one shape need not be far apart in the same way."""
    tried = []
    best_of = ceiling.Ceiling._best_of

    def spy(self: Any, ways: Any, *arguments: Any) -> Any:
        tried.append(len(ways))
        return best_of(self, ways, *arguments)

    monkeypatch.setattr(ceiling.Ceiling, "_best_of", spy)
    pool = torch.ones(4, 16, 8, 16)
    inside, outside = pool[::2], pool.transpose(1, 2).contiguous().transpose(1, 2)[::2]
    finder = ceiling.Ceiling(Clock(CPU))
    for tensor in (inside[:, :, :1], outside[:, :, :1], inside[:, :, :1]):
        finder.best([[tensor]])
    first, second, third = tried[:: len(ceiling._ROUNDS)]
    assert first == second > third


def test_no_ceiling_for_other_devices() -> None:
    with pytest.raises(NotImplementedError, match="no read ceiling for meta in this version"):
        ceiling.Ceiling(Clock(torch.device("meta")))


# --- the stopwatch


def test_laps_are_inside_each_other() -> None:
    case = cases.build(Spec(Shape(SELECT, (16384,))), CPU, 0)
    with runner.Runner(CPU, QUICK).setting(threads=1):
        laps = Laps.of(case.calls[0])
    assert laps.python > laps.call > laps.kernel > laps.scoring + laps.selection
    assert min(laps.scoring, laps.selection) > 0


def test_the_stopwatch_starts_at_zero_and_stops() -> None:
    case = cases.build(Spec(Shape(SELECT, (16384,))), CPU, 0)
    Laps.of(case.calls[0])
    before = LIB.stopwatch_time(0)
    case.calls[0]()
    assert LIB.stopwatch_time(0) == before > 0
    assert Laps.of(lambda: None).call == 0


def test_the_stopwatch_stops_when_a_call_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        Laps.of(lambda: 1 / 0)
    cases.build(Spec(Shape(SELECT, (16384,))), CPU, 0).calls[0]()
    assert LIB.stopwatch_time(0) == 0


# --- measuring


class FakeClock(Clock):
    """Every call takes a second; keeps who was called."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.settled = 0

    def seconds(self, call: object) -> float:
        call()  # type: ignore[operator]
        return 1.0

    def settle(self) -> None:
        self.settled += 1


def test_rounds_interleave() -> None:
    seen: list[tuple[str, int]] = []
    contenders = [Contender(lambda turn, name=name: seen.append((name, turn))) for name in "abc"]
    rare = [Contender(lambda turn: seen.append(("rare", turn)))]
    effort = replace(QUICK, seconds=0.0, least_rounds=4, most_rounds=9)
    clock = FakeClock()
    seconds, rare_seconds = interleave(clock, contenders, Turns(5), effort, rare)
    assert [len(taken) for taken in seconds] == [4, 4, 4]
    assert rare_seconds == [[1.0]]  # too long for a second time
    assert clock.settled == 4
    assert [turn for _, turn in seen] == [i % 5 for i in range(len(seen))]
    names = [name for name, _ in seen]
    assert names[:4] == ["rare", *"abc"]  # once unmeasured
    assert names[7:9] == ["rare", "a"]
    rounds = [names[4:7], *(names[i : i + 3] for i in (9, 13, 17))]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(map(tuple, rounds))) > 1  # in different orders


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3, 2, 4)


def test_last_cache() -> None:
    assert last_cache_bytes() >= 1 << 17


# --- cases


@pytest.mark.parametrize("name", SUITES)
def test_suites(name: str) -> None:
    specs = SUITES[name]()
    assert len(set(specs)) == len({spec.name for spec in specs}) == len(specs)
    assert all(spec.label for spec in specs)


def test_suites_have_what_the_speed_is_judged_by() -> None:
    lines = {spec.label for spec in SUITES["speed"]()} | {
        name.split(":")[0] for name in comparisons.COMPARISONS
    }
    assert lines == {f"line {number}" for number in range(1, 14)}
    first = [spec for spec in SUITES["speed"]() if spec.label in ("line 1", "line 2")]
    assert {(s.shape.operator, s.dtype, s.threads) for s in first} == {
        (operator, dtype, threads)
        for operator in (SELECT, PREFILL)
        for dtype in ("fp16", "bf16")
        for threads in (1, None)
    }
    assert {s.simd_target for s in SUITES["speed"]() if s.label == "line 10"} == {"AVX2"}
    context = [spec.shape.seq_lens for spec in SUITES["context"]()]
    assert min(context) == (8192,)
    assert max(context) == (1 << 20,)


SPECS = [
    *quick([spec for suite in SUITES.values() for spec in suite()]),
    Spec(Shape(SELECT, (4096, 8192), num_heads=4, num_kv_heads=2, rows=32, k=40)),
    Spec(Shape(TABLES, (16384,) * 3, num_kv_heads=2, k=16)),
    Spec(Shape(ATTEND, (1024,) * 3, num_heads=6, num_kv_heads=2, block_size=64, rows=1, k=3)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_cases_agree_with_their_reference(spec: Spec) -> None:
    case = cases.build(replace(spec, shape=spec.shape), CPU, 1 << 20)
    case.check()
    assert case.bytes_per_call > 0
    assert len({len(case.calls), len(case.touched)}) == 1
    for prepare in case.alternatives(False).values():
        calls = prepare()
        assert len(calls) == len(case.calls)
        calls[-1]()
        case.calls[-1]()


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (SELECT, "does not exist"),
        (PREFILL, "maxblocks are not what the reference writes"),
        (TABLES, "tables are not the reference's"),
        (ATTEND, "out is not the reference's"),
    ],
)
def test_a_wrong_result_is_not_measured(
    operator: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cases, operator, lambda *arguments, **options: None)
    assert command.main(["--quick", "--suite", "shapes", "--filter", operator]) == 1
    printed = capsys.readouterr()
    assert "WRONG RESULT: " in printed.out
    assert message in printed.out
    assert "not to be trusted" in printed.err


def test_subtly_wrong_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(Shape(SELECT, (16384,), k=8))

    def checked(damage: object) -> None:
        def operator(*arguments: torch.Tensor, out: torch.Tensor, **options: object) -> None:
            real(*arguments, out=out, **options)
            damage(out)  # type: ignore[operator]

        real = cases.quest_block_select_paged
        with monkeypatch.context() as patch:
            patch.setattr(cases, "quest_block_select_paged", operator)
            cases.build(spec, CPU, 0).check()

    def worst(out: torch.Tensor) -> None:
        chosen = set(out[0, 3].tolist())
        out[0, 3, 7] = next(j for j in range(128) if j not in chosen)

    checked(lambda out: None)
    checked(lambda out: out.copy_(out.flip(-1)))  # the order is for the tests of the operator
    with pytest.raises(cases.WrongResultError, match="not the best"):
        checked(worst)
    with pytest.raises(cases.WrongResultError, match="does not exist"):
        checked(lambda out: out[0, 0, 7:].fill_(-1))


# --- alternatives


def test_a_compiler_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile(function: object, **options: object) -> object:
        def fail(problem: object) -> None:
            raise RuntimeError("no working C++ compiler\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(alternatives, "_compiled", {})
    measurer = runner.Runner(CPU, QUICK)
    result = measurer.run(Spec(Shape(SELECT, (16384,)), compiled=True))
    assert result.skipped == {"torch.compile": "no working C++ compiler"}
    assert list(result.alternatives) == ["torch"]


def test_peers_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setitem(
        alternatives.PEERS, "peer", lambda problems: [lambda: calls.append(1)] * len(problems)
    )

    def do_other_work(problems: object) -> NoReturn:
        raise alternatives.OtherWorkError("nothing like it")

    monkeypatch.setitem(alternatives.PEERS, "stranger", do_other_work)
    result = runner.Runner(CPU, QUICK).run(Spec(Shape(SELECT, (16384,))))
    assert result.best_alternative == "peer"
    assert "stranger" not in result.alternatives | result.skipped
    assert calls


# --- the command


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_json, picture = tmp_path / "run.json", tmp_path / "run.png"
    before = (runtime.get_num_threads(), runtime.simd_target(), torch.get_num_threads())
    options = ["--filter", "context|line [18]:", "--json", str(run_json), "--plot", str(picture)]
    assert command.main(["--quick", *options]) == 0
    assert (runtime.get_num_threads(), runtime.simd_target(), torch.get_num_threads()) == before
    lines = capsys.readouterr().out.splitlines()
    assert "threads |" in lines[0]
    assert "commit" in lines[0]
    assert lines[1].startswith("read ceiling ")
    assert sum("of the ceiling" in line and "x torch" in line for line in lines) == 3
    table = lines[lines.index("the table of speed") + 1 :]
    assert [line.split()[:2] for line in table] == [["line", "1"], ["line", "8"]]
    assert picture.read_bytes().startswith(b"\x89PNG")

    run = json.loads(run_json.read_text())
    assert run["schema"] == 1
    assert set(run) == {"schema", "header", "cases", "findings"}
    assert set(run["header"]) == {
        *("device", "threads", "ceilings_gb_per_s", "simd_target", "simd_targets", "commit"),
        *("last_cache_bytes", "select_attn_ops", "torch", "python", "platform", "realtime"),
    }
    assert {case["label"] for case in run["cases"]} == {"line 1", "context"}
    for case in run["cases"]:
        assert set(case) == {
            *("label", "operator", "shape", "dtype", "threads", "simd_target", "seconds"),
            *("bytes", "gb_per_s", "ceiling", "share", "credible", "disturbed"),
            *("alternatives", "skipped", "speedup", "sets", "rounds"),
        }
        assert set(case["seconds"]) == set(case["share"]) == {"median", "low", "high"}
        assert set(case["ceiling"]) == {"gb_per_s", "way"}
        assert case["seconds"]["median"] > 0
        assert case["speedup"] > 0
    (finding,) = run["findings"]
    assert finding.pop("value") > 0
    assert finding == {
        "label": "line 8",
        "what": "time of 128k tokens over 8 times that of 16k",
        "limit": 1.1,
        "unit": "",
        "note": "",
    }


def test_options_replace_what_the_suites_say(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--list", "--suite", "context", "--filter", "tokens=8k", "--dtype", "fp16", "fp32"]
    target = runtime.simd_targets()[-1]
    assert command.main([*arguments, "--threads", "1", "3", "--simd-target", target]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == 2 * 2 * 2
    assert all(name.startswith("context: ") and name.endswith(target) for name in names)
    assert {name.split()[-3] for name in names} == {"fp16", "fp32"}
    assert {name.split()[-2] for name in names} == {"threads=1", "threads=3"}


def test_a_ceiling_that_is_no_ceiling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", replace(QUICK, small=False))
    monkeypatch.setattr(runner, "CREDIBLE_SHARE", 0.0)
    assert command.main([*SMALL, "--filter", SELECT]) == 1
    printed = capsys.readouterr()
    assert "THE CEILING IS WRONG" in printed.out
    assert "not to be trusted" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "no such case"], "no case is left: --list prints those there are"),
        (["--device", "meta"], "the benchmark is for cpu and cuda, not for meta"),
        (["--device", "abacus"], "torch does not know the device abacus"),
        (["--suite", "speed", "--plot", "x.png"], "--plot draws the cases of the suite context"),
        (["--suite", "context", "--threads", "0"], "must be in [1, 65536], got 0"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["bench", "--quick", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--suite", "nonsense"], ["bench", "--filter", "("], ["bench", "x"], ["info", "x"]],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command_line.main(arguments)
    assert raised.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_realtime(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    policies = {0: os.SCHED_OTHER}

    def set_policy(process: int, policy: int, parameters: os.sched_param) -> None:
        assert os.sched_get_priority_min(policy) <= parameters.sched_priority
        policies[process] = policy

    monkeypatch.setattr(os, "sched_setscheduler", set_policy)
    monkeypatch.setattr(os, "sched_getscheduler", policies.get)
    assert command.main([*SMALL, "--filter", SELECT]) == 0
    assert "real-time" not in capsys.readouterr().out
    assert command.main([*SMALL, "--filter", SELECT, "--realtime"]) == 0
    assert " | real-time\n" in capsys.readouterr().out


def test_realtime_without_the_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert command_line.main(["bench", *SMALL, "--realtime"]) == 1
    assert "error: --realtime needs CAP_SYS_NICE" in capsys.readouterr().err


def test_plot_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line.main(["bench", *SMALL, "--plot", "x.png"]) == 1
    assert "error: --plot needs matplotlib" in capsys.readouterr().err


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_torch() -> None:
    done = python(
        "import sys; sys.modules['torch'] = None\n"
        "from select_attn_ops.__main__ import main\n"
        "sys.exit(main(['bench', '--list']))"
    )
    assert done.returncode == 1
    assert "error: the benchmark needs torch, which cannot be imported" in done.stderr


def test_the_package_does_not_import_its_benchmark() -> None:
    done = python(
        "import sys, select_attn_ops.__main__\n"
        f"assert {bench.__name__!r} not in sys.modules and 'matplotlib' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_comparisons() -> None:
    measurer = runner.Runner(CPU, QUICK)
    findings = [each for compare in comparisons.COMPARISONS.values() for each in compare(measurer)]
    by_label = {finding.label for finding in findings}
    assert by_label == {"line 6", "line 7", "line 8", "line 9", "line 12", "line 13"}
    for finding in findings:
        assert finding.value is None or finding.value > 0, finding
        assert (finding.value is None) == bool(finding.note), finding


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    target = runtime.simd_targets()[-1]
    arguments = ["--quick", "--profile", "--filter", "line 3", "--simd-target", target]
    assert command.main(arguments) == 0
    *cases, select, prefill = capsys.readouterr().out.splitlines()
    for line, operator in zip(cases, (SELECT, PREFILL), strict=True):
        bare = r" \(scoring without arithmetic: [\d.]+ of its time\)" if operator == SELECT else ""
        begin = (
            rf"line 3: {operator} .* {target}: (\S+) of the ceiling{bare}; of the threads' time: "
        )
        match = re.fullmatch(begin + "(.*)", line)
        assert match is not None, line
        parts = dict(part.rsplit(" ", 1) for part in match[2].split(", "))
        names = {"Python", "C++ around the kernel"}
        names |= {"scoring", "selecting", "the rest"} if operator == SELECT else {"the kernel"}
        assert set(parts) == names
        assert all(-0.05 <= float(part) <= 1 for part in parts.values()), line
    for line, operator in ((select, SELECT), (prefill, PREFILL)):
        ending = r": [\d.]+ GB/s from the second-level cache"
        assert re.fullmatch(rf"{operator} \(bf16, 1 thread, {target}\){ending}", line)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", runtime.simd_targets())
def test_without_arithmetic(target: str, dtype: torch.dtype) -> None:
    """It computes nothing, and the next call computes again."""
    runtime.set_simd_target(target)
    rows = torch.arange(1.0, 17).to(dtype).view(1, 16, 1, 1).expand(-1, -1, -1, 64).contiguous()
    query = torch.ones(1, 1, 64, dtype=dtype)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    first = torch.tensor([[[0]]], dtype=torch.int32)

    def select() -> torch.Tensor:
        return quest_block_select_paged(query, rows, rows, table, lens, 1, block_size=1)

    def attend() -> torch.Tensor:
        return paged_select_attention(query, rows, rows, table, lens, first)

    assert select().item() == 15
    for call in (select, attend):
        want = call()
        got: list[torch.Tensor] = []
        without_arithmetic(lambda call=call, got=got: got.append(call()))()
        assert not torch.equal(got[0], want)
        assert torch.equal(call(), want)


def test_parts_of_a_call() -> None:
    """Two threads of which one does all, two that share the work, and a kernel with no phases."""
    serial = Laps(python=100, call=80, kernel=76, scoring=60, selection=10)
    assert parts_of_a_call([serial], 2) == pytest.approx(
        {
            "Python": 0.2,
            "C++ around the kernel": 0.04,
            "scoring": 0.3,
            "selecting": 0.05,
            "the rest": 0.41,  # half of the 70, and 6 more
        }
    )
    shared = Laps(python=100, call=80, kernel=76, scoring=120, selection=20)
    parts = parts_of_a_call([shared, shared, serial], 2)
    assert parts["scoring"] == pytest.approx(0.6)
    assert parts["the rest"] == pytest.approx(0.06)
    plain = Laps(python=100, call=80, kernel=76, scoring=0, selection=0)
    assert parts_of_a_call([plain], 2) == pytest.approx(
        {"Python": 0.2, "C++ around the kernel": 0.04, "the kernel": 0.76}
    )


@pytest.mark.parametrize("option", [["--check"], ["--json", "a"], ["--plot", "a"]])
def test_profile_goes_alone(option: list[str]) -> None:
    with pytest.raises(ValueError, match=f"does not go with {option[0]}"):
        command.main(["--profile", *option])


def test_a_comparison_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    findings = comparisons.between_torch(runner.Runner(CPU, QUICK))
    assert {(finding.value, finding.note) for finding in findings} == {
        (None, "it failed without a word")
    }


# --- CUDA devices, as far as there need be none


class FakeGraphClock(graphs.GraphClock):
    """Captures calls in a list."""

    def capture(self, calls: object) -> object:
        return lambda: [call() for call in calls]  # type: ignore[attr-defined]

    def seconds(self, call: object) -> float:
        call()  # type: ignore[operator]
        return 1.0


HAS_CUDA = any(each.available for each in runtime.backends() if each.name == "cuda")


@pytest.mark.skipif(HAS_CUDA, reason="there is a device")
def test_no_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["bench", "--quick", "--device", "cuda"]) == 1
    assert "there is no usable cuda backend: " in capsys.readouterr().err


@pytest.mark.parametrize(("sets", "nodes"), [(1, 40), (3, 42), (40, 40), (100, 100)])
def test_a_graph_has_every_set_equally_often(sets: int, nodes: int) -> None:
    seen: list[int] = []
    clock = FakeGraphClock(CPU)
    calls = [lambda number=number: seen.append(number) for number in range(sets)]
    for contender in (clock.contender(calls), clock.launched(calls)):
        seen.clear()
        assert contender.repeats == nodes
        assert contender.seconds(clock, 5) == 1 / nodes
        assert seen == [i % sets for i in range(nodes)]


class FakeCuda:
    """What `GraphClock` needs of torch.cuda; keeps what happened."""

    def __init__(self, *, end_fails: bool = False) -> None:
        self.seen: list[str] = []
        self._end_fails = end_fails

    def Stream(self, device: object) -> FakeCuda:
        return self

    CUDAGraph = lambda self: self  # noqa: E731
    current_stream = Stream

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait_stream(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        self.seen.append("wait")

    def capture_begin(self) -> None:
        self.seen.append("begin")

    def capture_end(self) -> None:
        self.seen.append("end")
        if self._end_fails:
            raise RuntimeError("the capture is void\nbecause")

    def replay(self) -> None:
        self.seen.append("replay")


def test_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(graphs, "_cuda", cuda)
    calls = [lambda: cuda.seen.append("a"), lambda: cuda.seen.append("b")]
    graphs.GraphClock(torch.device("cuda")).capture(calls)()
    assert cuda.seen == ["a", "wait", "begin", "a", "b", "end", "replay"]


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = graphs.GraphClock(torch.device("cuda"))
    cuda = FakeCuda(end_fails=True)
    monkeypatch.setattr(graphs, "_cuda", cuda)
    with pytest.raises(graphs.CaptureError, match=r"^the capture is void$"):
        clock.capture([lambda: None])

    def fail() -> None:
        if "begin" in cuda.seen:
            raise RuntimeError("not while capturing")

    cuda.seen.clear()
    with pytest.raises(graphs.CaptureError, match="not while capturing"):
        clock.capture([fail])
    assert cuda.seen == ["wait", "begin", "end"]


def test_rounds_count_all_repeats() -> None:
    effort = replace(QUICK, seconds=10.0, least_rounds=1, most_rounds=100)
    clock = FakeGraphClock(CPU)
    (seconds,), _ = interleave(clock, [clock.contender([lambda: None])], Turns(1), effort)
    assert seconds == [1 / 40] * 11


def test_graphs_measure_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "ways_to_read", lambda tensors: WAYS[:3])
    monkeypatch.setattr(runner, "clock_for", FakeGraphClock)
    measurer = runner.Runner(CPU, replace(QUICK, least_rounds=1, most_rounds=1))
    shape = Shape(SELECT, (16384,), num_heads=4, num_kv_heads=2)
    result = measurer.run(Spec(shape, warm=True))
    assert result.sets == 1
    assert result.seconds.median == 1 / 40
    assert result.shape.endswith(" warm")
    assert list(result.alternatives) == ["torch"]


def test_what_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(FakeGraphClock):
        def capture(self, calls: object) -> object:
            if calls[0].func is alternatives.select:  # type: ignore[index]
                raise graphs.CaptureError("it waits")
            return super().capture(calls)

    monkeypatch.setattr(ceiling, "ways_to_read", lambda tensors: WAYS[:3])
    monkeypatch.setattr(runner, "clock_for", Clock)
    result = runner.Runner(CPU, QUICK).run(Spec(Shape(SELECT, (16384,))))
    assert list(result.alternatives) == ["torch, in no graph"]


def test_ways_of_a_device() -> None:
    ways = device_ceiling.device_ways()
    assert len(set(ways)) == len({str(way) for way in ways}) == len(ways)
    own = [way for way in ways if isinstance(way, device_ceiling.DeviceWay)]
    assert len(ways) - len(own) == 2
    assert {way.vector_bytes for way in own} == {8, 16}
    assert {way.loads for way in own} == {2, 4, 8}
    assert {way.streaming for way in own} == {False, True}
    assert {way.threads * way.blocks_per_processor for way in own} == {256, 512, 1024, 2048}


def test_a_device_reads_as_many_bytes_as_count(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Library:
        @staticmethod
        def read_device_memory(*arguments: object) -> None:
            tensors, bits, options = arguments[:3], arguments[3], arguments[4:]
            assert isinstance(bits, torch.Tensor)
            assert bits.shape == (2 * 7,)
            assert options == (256, 4, 16, True)
            read.append(sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor)))

    monkeypatch.setattr(device_ceiling, "LIB", Library)
    monkeypatch.setattr(device_ceiling, "processors", lambda device: 7)
    dense, gappy = torch.zeros(4, 8, 16).transpose(0, 1), torch.zeros(4, 8, 32)[..., :16]
    clock = FakeGraphClock(CPU)
    sets = [(dense,), (dense, gappy)]
    way = device_ceiling.DeviceWay(256, 2, 4, 16, True)
    device_ceiling.device_reader(clock, sets, way).seconds(clock, 0)
    sizes = [sum(map(spans.touched_bytes, tensors)) for tensors in sets]
    assert read == [2048, 4096] * 20 == sizes * 20
    for name in ("amax", "sum"):
        torch_way = device_ceiling.TorchWay(name)
        assert device_ceiling.device_reader(clock, sets, torch_way).repeats == 40


def test_the_empty_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Library:
        read_device_memory = staticmethod(lambda *arguments: calls.append(arguments))

    monkeypatch.setattr(device_ceiling, "LIB", Library)
    clock = FakeGraphClock(CPU)
    assert device_ceiling.empty_kernel(clock, 3).seconds(clock, 0) == 1 / 40
    assert calls[0][:3] == (None, None, None)
    assert calls[0][3].shape == (3,)  # type: ignore[attr-defined]
    assert calls[0][5] == 0
    assert runner.Runner(CPU, QUICK).empty_kernels() == {}


@pytest.mark.parametrize(
    ("tensors", "bits", "vector_bytes", "error", "message"),
    [
        ([], torch.zeros(1), 16, ValueError, "bits must be a dense int32 vector"),
        ([], torch.zeros(2, 2, dtype=torch.int32), 16, ValueError, "bits must be a dense int32"),
        ([], torch.zeros(4, dtype=torch.int32)[::2], 16, ValueError, "bits must be a dense int32"),
        ([], None, 0, ValueError, "vector_bytes must be at least 1, got 0"),
        ([torch.zeros(4, 4)[:, :2]], None, 16, ValueError, "must have no gaps"),
        ([torch.zeros(64)[1:]], None, 16, ValueError, "must begin at a multiple of 16 bytes"),
        ([torch.zeros(64)], None, 16, NotImplementedError, "is not implemented on cpu"),
    ],
)
def test_reading_device_memory_checks(
    tensors: list[torch.Tensor],
    bits: torch.Tensor | None,
    vector_bytes: int,
    error: type[Exception],
    message: str,
) -> None:
    bits = torch.zeros(1, dtype=torch.int32) if bits is None else bits
    with pytest.raises(error, match=message):
        LIB.read_device_memory(*[*tensors, None, None, None][:3], bits, 256, 4, vector_bytes, True)


def test_the_lines_of_a_gpu() -> None:
    specs = suites.SUITES["gpu"]()
    metadata = {
        spec.label: 2 * sum(spec.shape.num_blocks) * 8 * 128 * 2 >> 20
        for spec in specs
        if spec.shape.operator == SELECT
    }
    assert metadata == {"gpu 1": 256, "gpu 3": 4, "gpu 4": 4, "gpu 5": 32, "warm": 32}
    keys = {
        spec.shape.batch * (spec.shape.updated_blocks or spec.shape.num_blocks[0]) // 4
        for spec in specs
        if spec.shape.operator == PREFILL
    }
    assert keys == {256, 1024, 8}
    assert all(spec.shape.table_blocks == 8192 for spec in specs)
    assert {spec.warm for spec in specs if spec.label == "gpu 4"} == {True}
    assert not any(spec.warm for spec in specs if spec.label in ("gpu 3", "gpu 5", "gpu 6"))
    assert {spec.label for spec in specs} - {"warm"} == {*report.TIMES, "gpu 1", "gpu 2"}


def test_on_cuda() -> None:
    for name, suite in SUITES.items():
        specs = suites.on_cuda(suite())
        assert len(set(specs)) == len(specs) > 0
        for spec in specs:
            assert spec.threads is None
            assert spec.simd_target is None
            assert spec.shape.table_blocks == 8192
            assert name == "gpu" or spec.label not in report.SHARES


@pytest.mark.parametrize(
    ("operator", "place", "width"),
    [(SELECT, 3, 13), (PREFILL, 1, 100), (TABLES, 1, 100), (ATTEND, 3, 100)],
)
def test_wide_tables(
    operator: str, place: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def spy(*arguments: torch.Tensor, **options: object) -> None:
        widths.append(arguments[place].shape[1])
        real(*arguments, **options)

    real = getattr(cases, operator)
    monkeypatch.setattr(cases, operator, spy)
    shape = Shape(operator, (2048, 2048), num_kv_heads=2, rows=8, k=4, table_blocks=100)
    cases.build(Spec(shape), CPU, 0).check()
    assert widths == [width]


def test_an_update_writes_the_last_blocks_only() -> None:
    shape = Shape(PREFILL, (1024, 2048), num_kv_heads=2, rows=8, updated_blocks=3)
    case = cases.build(Spec(shape), CPU, 0)
    case.check()
    row = 2 * 128 * 2
    assert case.touched_bytes == 6 * 128 * row
    assert case.bytes_per_call == case.touched_bytes + 2 * 6 * row


def result(label: str, microseconds: float, **fields: object) -> runner.Result:
    time = microseconds * 1e-6
    made = runner.Result(
        device_type="cuda",
        label=label,
        operator=SELECT,
        shape="B=1",
        dtype="bf16",
        threads=2,
        simd_target="AVX2",
        seconds=Spread(time, time, time),
        rate=1e12,
        bytes_per_call=1 << 20,
        ceiling_rate=2e12,
        ceiling_way="2 x 256 threads",
        share=Spread(0.91, 0.9, 0.92),
        alternatives={"torch": 2 * time},
        skipped={},
        disturbed=False,
        sets=1,
        rounds=1,
    )
    return replace(made, **fields)


def test_a_busy_machine_gives_no_verdict() -> None:
    disturbed = result("line 1", 50, disturbed=True, device_type="cpu", share=Spread(1, 1, 1))
    assert not disturbed.credible
    assert "THE MACHINE WAS BUSY" in report.case_text(disturbed)
    assert "unknown" in report.table_text([disturbed], [])


@pytest.mark.parametrize(("limit", "cares"), [(1e9, (1,)), (0, (1, 2, 4))])
def test_more_than_the_ceiling_is_measured_again_with_more_care(
    limit: float, cares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, rounds = [], []
    interleave_all = runner.interleave

    def interleave_some(clock: Any, contenders: Any, turns: Any, effort: Any, rare: Any) -> Any:
        ways.append(len(contenders) - 1)
        rounds.append(effort.least_rounds)
        return interleave_all(clock, contenders, turns, effort, rare)

    monkeypatch.setattr(runner, "CREDIBLE_SHARE", limit)
    monkeypatch.setattr(runner, "interleave", interleave_some)
    run = runner.Runner(CPU, QUICK)
    case = run.build(Spec(Shape(SELECT, (512,), num_heads=1, num_kv_heads=1, rows=4)))
    assert run.measure(case, beside_alternatives=False).credible == (limit > 0)
    assert ways == [3 * care for care in cares]
    assert rounds == [3 * care for care in cares]


@pytest.mark.parametrize(("share_of_rate", "disturbed"), [(1.0, False), (3.0, True)])
def test_notices_a_busy_machine(
    share_of_rate: float, disturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of the case that is much slower than the one at the start."""
    monkeypatch.setattr(runner, "_LONG_READ", 0)
    measurer = runner.Runner(CPU, QUICK)
    rates = measurer.read_rates()
    spec = Spec(Shape(SELECT, (65536,)), threads=1)
    quiet = measurer.run(spec)
    rates[1] = quiet.ceiling_rate * share_of_rate
    monkeypatch.setattr(runner, "_BUSY_SHARE", 1.0 if disturbed else 0.01)
    assert measurer.run(spec).disturbed == disturbed


def test_verdicts_on_a_gpu() -> None:
    results = [
        result("gpu 1", 50),
        result("gpu 2", 50),
        result("gpu 3", 8.5),
        result("gpu 6", 5.5),
        result("gpu 6", 5.5, device_type="cpu"),
        result("warm", 5.5, alternatives={"torch": 5e-6}, skipped={"torch.compile": "no compiler"}),
    ]
    findings = comparisons.beside_alternatives(results)
    rows = report.table_text(results, findings).splitlines()[2:]
    assert [(*row.split()[:2], *re.findall("met|MISSED|unknown", row)) for row in rows] == [
        ("gpu", "1", "met"),
        ("gpu", "2", "MISSED"),
        ("gpu", "3", "MISSED"),
        ("gpu", "6", "met"),
        ("gpu", "6", "unknown"),
        ("gpu", "7", "MISSED"),
    ]
    assert "8.500 us" in rows[2]
    assert "met" not in report.table_text(results, findings, verdicts=False)
    assert "slower in 1 of 6 cases; here beside torch; " in rows[5]
    assert "no torch.compile in 1 cases" in rows[5]
    assert "threads" not in rows[0]
    assert report.case_text(results[2]).startswith(f"gpu 3: {SELECT} (B=1, bf16): 8.5 us | ")
    assert comparisons.beside_alternatives([result("x", 1, alternatives={})]) == []


def test_the_header_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "device_text", lambda device: "cuda (a GPU)")
    monkeypatch.setattr(report, "last_cache_bytes", lambda device: 50 << 20)
    header = report.header(torch.device("cuda"), {1: 4e12}, {1: 1.25e-6, 132: 1.5e-6})
    text = report.header_text(header)
    assert text.startswith("cuda (a GPU) | last cache 50 MiB | ")
    assert "read ceiling 4000.0 GB/s; " in text
    assert text.endswith(
        "an empty kernel takes 1.25 us with 1 thread block and 1.50 us with 132 thread blocks"
    )


def test_check_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--check", "--suite", "shapes", "--filter", "tables|ragged"]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith(": right") for line in lines)
    monkeypatch.setattr(cases, TABLES, lambda *arguments, **options: None)
    assert command.main(arguments) == 1
    assert "WRONG RESULT: tables are not the reference's" in capsys.readouterr().out


def test_no_case_begins_after_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*SMALL, "--limit-seconds", "1e-9"]) == 0
    assert "2 of 2 cases are left out, for lack of time" in capsys.readouterr().out


def test_flashinfer_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    class FlashInfer:
        @staticmethod
        def top_k(scores: torch.Tensor, k: int, sorted: bool) -> object:
            return scores.topk(k, sorted=sorted)

    (prepare,) = alternatives.CUDA_PEERS.values()
    metadata = torch.randn(2, 4, 2, 8)
    problem = alternatives.SelectionProblem(
        torch.randn(1, 2, 8), metadata, -metadata, torch.tensor([[1, 0]]), None, 8, None, 3
    )
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(alternatives.UnavailableError, match="flashinfer"):
        prepare([problem])
    monkeypatch.setitem(sys.modules, "flashinfer", FlashInfer)
    (call,) = prepare([problem])
    assert torch.equal(call().indices[None], alternatives.select(problem))  # type: ignore[attr-defined]
    numbers = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(alternatives.UnavailableError, match="it has nothing like it"):
        prepare([alternatives.TablesProblem(numbers, numbers, numbers, 1)])
    assert not set(alternatives.CUDA_PEERS) & set(alternatives.alternatives(True, CPU))


@pytest.mark.parametrize("operator", [SELECT, PREFILL])
def test_inputs_leave_memory_to_the_alternatives(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Spec(Shape(operator, (512,), num_heads=1, num_kv_heads=1, rows=4, places_per_block=8))

    def sets_and_bytes() -> tuple[int, int]:
        case = cases.build(spec, CPU, rotated_bytes=1 << 21)
        return len(case.calls), sum(t.untyped_storage().nbytes() for t in case.touched[0])

    sets, size = sets_and_bytes()
    memory = 4 * size // 2
    monkeypatch.setattr(cases, "total_memory_bytes", lambda: memory)
    fewer, smaller = sets_and_bytes()
    assert 2 < fewer < sets
    assert smaller <= memory / 4

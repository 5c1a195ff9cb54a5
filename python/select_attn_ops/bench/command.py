"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import runtime
from . import alternatives, peers, report
from .cases import DTYPES, TABLES, Spec, WrongResultError, build
from .comparisons import COMPARISONS, Finding, beside_alternatives
from .measuring import QUICK, THOROUGH
from .plot import check_plot, write_plot
from .profile import profile
from .runner import Result, Runner
from .suites import SUITES, on_cuda, quick


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m select_attn_ops bench",
        description="Measure every operator beside the best read of the same memory, and beside "
        "what torch does in its place.",
    )
    parser.add_argument("--device", default="cpu", help="where the operators run (default: cpu)")
    parser.add_argument(
        "--suite", nargs="+", choices=[*SUITES], help="default: all; of gpu's only on a GPU"
    )
    parser.add_argument(
        "--filter", type=_pattern, metavar="REGEX", help="only cases whose name has it"
    )
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], help="in place of the suites' own")
    parser.add_argument("--threads", nargs="+", type=int, help="in place of the suites' own")
    parser.add_argument(
        "--simd-target", choices=runtime.simd_targets(), help="in place of the suites' own"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="other libraries: what scripts/build_peers.sh built",
    )
    parser.add_argument("--quick", action="store_true", help="small data, to see that it works")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="only say where the time of a call goes (default suite: speed)",
    )
    parser.add_argument(
        "--check", action="store_true", help="only check the results, and measure nothing"
    )
    parser.add_argument(
        "--limit-seconds", type=float, metavar="N", help="begin no case after so many seconds"
    )
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="keep other processes off the processors meanwhile (needs the right to do so)",
    )
    parser.add_argument("--list", action="store_true", help="print names and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the suite context")
    return parser


def _suites(options: argparse.Namespace) -> list[str]:
    on_cpu = torch.device(options.device).type == "cpu"
    if options.profile and not options.suite:
        return ["speed"]
    return list(options.suite or (name for name in SUITES if name != "gpu" or not on_cpu))


def _specs(options: argparse.Namespace) -> list[Spec]:
    specs = [spec for name in _suites(options) for spec in SUITES[name]()]
    if torch.device(options.device).type == "cuda":
        specs = on_cuda(specs)
    if options.quick:
        specs = quick(specs)
    if options.dtype:
        specs = [replace(spec, dtype=dtype) for spec in specs for dtype in options.dtype]
    if options.threads:
        specs = [replace(spec, threads=count) for spec in specs for count in options.threads]
    if options.simd_target:
        specs = [replace(spec, simd_target=options.simd_target) for spec in specs]
    if options.filter:
        specs = [spec for spec in specs if options.filter.search(spec.name)]
    return list(dict.fromkeys(specs))


def _comparisons(options: argparse.Namespace) -> list[str]:
    if "speed" not in _suites(options) or torch.device(options.device).type != "cpu":
        return []
    return [name for name in COMPARISONS if not options.filter or options.filter.search(name)]


def _check_device(name: str) -> torch.device:
    """The device; a ValueError where there is none, or nothing of the library runs on it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"torch does not know the device {name}") from error
    if device.type == "cuda":
        (backend,) = (each for each in runtime.backends() if each.name == "cuda")
        if not backend.available:
            raise ValueError(f"there is no usable cuda backend: {backend.description}")
        if not torch.cuda.is_available():
            raise ValueError(f"this torch, {torch.__version__}, finds no CUDA device")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"the benchmark is for cpu and cuda, not for {device}")
    return device


def _refuse_on_device(options: argparse.Namespace) -> None:
    for name in ("threads", "simd_target", "profile", "peers"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with --device cpu only")


def _refuse_beside_profile(options: argparse.Namespace) -> None:
    for name in ("check", "json", "plot", "peers"):
        if getattr(options, name):
            raise ValueError(f"--profile does not go with --{name}")


def _take_realtime_priority() -> None:
    """For this thread and those that it starts from now on."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError as error:
        raise ValueError("--realtime needs CAP_SYS_NICE, which root has") from error


def _check(runner: Runner, specs: Sequence[Spec]) -> int:
    """Compare the operators' results with their references'; returns the exit status."""
    status = 0
    for spec in specs:
        outcome = "right"
        try:
            build(spec, runner.device, 0).check()
        except WrongResultError as error:
            outcome, status = f"WRONG RESULT: {error}", 1
        print(f"{spec.name}: {outcome}", flush=True)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = _check_device(options.device)
    if device.type != "cpu":
        _refuse_on_device(options)
    specs, comparisons = _specs(options), _comparisons(options)
    if options.profile:
        _refuse_beside_profile(options)
        specs, comparisons = [spec for spec in specs if spec.shape.operator != TABLES], []
    if options.peers:
        alternatives.PEERS.update(peers.load(options.peers))
    if options.list:
        print(*(spec.name for spec in specs), *comparisons, sep="\n")
        return 0
    if not specs and not comparisons:
        raise ValueError("no case is left: --list prints those there are")
    if options.plot:
        check_plot(options.plot)
        if not any(spec.label == "context" for spec in specs):
            raise ValueError("--plot draws the cases of the suite context, and none is left")
    if options.realtime:
        _take_realtime_priority()
    if options.profile:
        for line in profile(Runner(device, QUICK if options.quick else THOROUGH), specs):
            print(line, flush=True)
        return 0
    if options.check:
        return _check(Runner(device, QUICK if options.quick else THOROUGH), specs)

    deadline = time.monotonic() + (options.limit_seconds or math.inf)
    runner = Runner(device, QUICK if options.quick else THOROUGH)
    header = report.header(device, runner.read_rates(), runner.empty_kernels())
    print(report.header_text(header), flush=True)
    if runner.effort.small:
        print("quick: data that fits into the caches, and too few rounds: no figures to quote")
    results: list[tuple[Spec, Result]] = []
    findings: list[Finding] = []
    status = 0
    for number, spec in enumerate(specs):
        if time.monotonic() > deadline:
            print(f"{len(specs) - number} of {len(specs)} cases are left out, for lack of time")
            break
        try:
            result = runner.run(spec)
        except WrongResultError as error:
            print(f"{spec.name}: WRONG RESULT: {error}", flush=True)
            status = 1
            continue
        except RuntimeError as error:  # a device has more ways to fail than a processor
            if device.type == "cpu":
                raise
            print(f"{spec.name}: FAILED: {error}", flush=True)
            status = 1
            continue
        print(report.case_text(result), flush=True)
        results.append((spec, result))
        status |= not (result.credible or runner.effort.small)
    for name in comparisons:
        findings += COMPARISONS[name](runner)

    only_results = [result for _, result in results]
    if device.type != "cpu":
        findings += beside_alternatives(only_results)
    table = report.table_text(only_results, findings, verdicts=not runner.effort.small)
    if table:
        print(table)
    if options.json:
        report.write_json(options.json, header, only_results, findings)
    if options.plot:
        points = [(max(s.shape.seq_lens), r) for s, r in results if s.label == "context"]
        write_plot(options.plot, points, report.header_text(header).splitlines()[0])
    if status:
        print("error: these figures are not to be trusted, see above", file=sys.stderr)
    return status

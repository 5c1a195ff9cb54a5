"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .. import runtime
from . import report
from .cases import DTYPES, Spec, WrongResultError
from .comparisons import COMPARISONS, Finding
from .measuring import QUICK, THOROUGH
from .plot import pyplot, write_plot
from .profile import profile
from .runner import Result, Runner
from .suites import SUITES, quick


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
    parser.add_argument("--suite", nargs="+", choices=[*SUITES], help="default: all of them")
    parser.add_argument(
        "--filter", type=_pattern, metavar="REGEX", help="only cases whose name has it"
    )
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], help="in place of the suites' own")
    parser.add_argument("--threads", nargs="+", type=int, help="in place of the suites' own")
    parser.add_argument(
        "--simd-target", choices=runtime.simd_targets(), help="in place of the suites' own"
    )
    parser.add_argument("--quick", action="store_true", help="small data, to see that it works")
    parser.add_argument(
        "--profile", action="store_true", help="only say where the time of a call goes"
    )
    parser.add_argument("--list", action="store_true", help="print names and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the suite context")
    return parser


def _specs(options: argparse.Namespace) -> list[Spec]:
    names = list(options.suite or SUITES)
    specs = [spec for name in names for spec in SUITES[name]()]
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
    if "speed" not in (options.suite or SUITES):
        return []
    return [name for name in COMPARISONS if not options.filter or options.filter.search(name)]


def _check_device(name: str) -> torch.device:
    """The device; a ValueError where there is none, or nothing of the library runs on it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"torch does not know the device {name}") from error
    if device.type != "cpu":
        raise ValueError(f"this version has operators for the CPU only, not for {device}")
    return device


def _refuse_beside_profile(options: argparse.Namespace) -> None:
    for name in ("suite", "filter", "dtype", "threads", "simd_target", "list", "json", "plot"):
        if getattr(options, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--profile goes with --device and --quick only, got {option}")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = _check_device(options.device)
    specs, comparisons = _specs(options), _comparisons(options)
    if options.profile:
        _refuse_beside_profile(options)
        print(*profile(Runner(device, QUICK if options.quick else THOROUGH)), sep="\n")
        return 0
    if options.list:
        print(*(spec.name for spec in specs), *comparisons, sep="\n")
        return 0
    if not specs and not comparisons:
        raise ValueError("no case is left: --list prints those there are")
    if options.plot:
        pyplot()  # whose absence should not come as a surprise at the end
        if not any(spec.label == "context" for spec in specs):
            raise ValueError("--plot draws the cases of the suite context, and none is left")

    runner = Runner(device, QUICK if options.quick else THOROUGH)
    header = report.header(device, runner.read_rates())
    print(report.header_text(header), flush=True)
    if runner.effort.small:
        print("quick: data that fits into the caches, and too few rounds: no figures to quote")
    results: list[tuple[Spec, Result]] = []
    findings: list[Finding] = []
    status = 0
    for spec in specs:
        try:
            result = runner.run(spec)
        except WrongResultError as error:
            print(f"{spec.name}: WRONG RESULT: {error}", flush=True)
            status = 1
            continue
        print(report.case_text(result), flush=True)
        results.append((spec, result))
        status |= not (result.credible or runner.effort.small)
    for name in comparisons:
        findings += COMPARISONS[name](runner)

    only_results = [result for _, result in results]
    table = report.table_text(only_results, findings)
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

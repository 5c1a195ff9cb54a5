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
from .measuring import QUICK, THOROUGH
from .runner import Result, Runner
from .suites import SUITES, quick


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m select_attn_ops bench",
        description="Measure every operator beside the best read of the same memory, and beside "
        "what torch does in its place.",
    )
    parser.add_argument("--device", default="cpu", help="where the operators run (default: cpu)")
    parser.add_argument("--suite", nargs="+", choices=[*SUITES], help="default: all of them")
    parser.add_argument(
        "--filter", type=re.compile, metavar="REGEX", help="only cases whose name has it"
    )
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], help="in place of the suites' own")
    parser.add_argument("--threads", nargs="+", type=int, help="in place of the suites' own")
    parser.add_argument(
        "--simd-target", choices=runtime.simd_targets(), help="in place of the suites' own"
    )
    parser.add_argument("--quick", action="store_true", help="small data, to see that it works")
    parser.add_argument("--list", action="store_true", help="print names and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the suite context")
    return parser


def _specs(options: argparse.Namespace) -> list[Spec]:
    specs = [spec for name in options.suite or SUITES for spec in SUITES[name]()]
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


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    specs = _specs(options)
    if options.list:
        print(*(spec.name for spec in specs), sep="\n")
        return 0
    device = torch.device(options.device)
    threads = runtime.get_num_threads()
    runner = Runner(device, QUICK if options.quick else THOROUGH, threads, runtime.simd_target())
    header = report.header(device, threads)
    print(report.header_text(header), flush=True)
    results: list[Result] = []
    status = 0
    for spec in specs:
        try:
            results.append(runner.run(spec))
        except WrongResultError as error:
            print(f"{spec.name}: WRONG RESULT: {error}", flush=True)
            status = 1
            continue
        print(report.case_text(results[-1]), flush=True)
        status |= not results[-1].credible
    if options.json:
        report.write_json(options.json, header, results)
    if status:
        print("error: not all figures can be trusted, see above", file=sys.stderr)
    return int(status)

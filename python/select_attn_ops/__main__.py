"""Command line: ``python -m select_attn_ops info``, ``bench`` and ``recall``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

from . import __version__, runtime


def info() -> str:
    """Version, backends, SIMD target and threads, a line each."""
    lines = [f"select-attn-ops {__version__}"]
    for backend in runtime.backends():
        state = "available" if backend.available else "not available"
        lines.append(f"backend {backend.name}: {state} ({backend.description})")
    lines += [
        f"SIMD target: {runtime.simd_target()} (of {', '.join(runtime.simd_targets())})",
        f"threads: {runtime.get_num_threads()}",
        f"Python {platform.python_version()}, {platform.platform()}",
    ]
    for package in ("apache-tvm-ffi", "torch", "numpy"):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m select_attn_ops")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print version, backends, SIMD target and threads")
    # Its options are its own affair: they need torch.
    commands.add_parser("bench", help="measure the operators beside the memory", add_help=False)
    commands.add_parser("recall", help="measure what a budget keeps", add_help=False)
    options, others = parser.parse_known_args(arguments)
    try:
        if options.command == "bench":
            from .bench.command import main as bench

            return bench(others)
        if options.command == "recall":
            from .recall.command import main as recall

            return recall(others)
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        print(info())
    except (ImportError, NotImplementedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

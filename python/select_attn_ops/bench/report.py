"""What a run says: to people a line per case, to programs JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__, runtime
from .comparisons import Finding
from .measuring import last_cache_bytes
from .runner import Result

SCHEMA = 1
"""Raised whenever a field of the JSON changes its name or meaning."""

_MIB = 1 << 20


def device_text(device: torch.device) -> str:
    """A device with its model, for people."""
    if device.type != "cpu":
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "cpu (" + next(line for line in lines if "model name" in line).split(": ")[1] + ")"
    except (OSError, StopIteration, IndexError):
        return "cpu"


def commit() -> str | None:
    """The commit of the working tree the package is in, if it is in one of its own."""
    command = ["git", "describe", "--always", "--dirty"]
    for folder in (Path(__file__).parent, Path.cwd()):
        if not any((parent / "kernels" / "core").is_dir() for parent in (folder, *folder.parents)):
            continue
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return done.stdout.strip()
    return None


def _has_realtime_priority() -> bool:
    return os.sched_getscheduler(0) == os.SCHED_FIFO


def header(
    device: torch.device,
    ceilings: Mapping[int, float],
    empty_kernels: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """What the figures of a run depend on.

    Parameters
    ----------
    device : torch.device
        Where the operators ran.
    ceilings : mapping of int to float
        Bytes per second, by threads.
    empty_kernels : mapping of int to float, optional
        Of a device: seconds of a kernel that does nothing, by thread blocks.
    """
    fields: dict[str, Any] = {
        "device": device_text(device),
        "threads": max(ceilings),
        "ceilings_gb_per_s": {str(count): rate / 1e9 for count, rate in ceilings.items()},
        "simd_target": runtime.simd_target(),
        "simd_targets": runtime.simd_targets(),
        "last_cache_bytes": last_cache_bytes(device),
        "select_attn_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "realtime": _has_realtime_priority(),
        "commit": commit(),
    }
    if device.type != "cpu":
        fields["empty_kernel_us"] = {
            str(blocks): seconds * 1e6 for blocks, seconds in (empty_kernels or {}).items()
        }
        fields["backends"] = [f"{each.name}: {each.description}" for each in runtime.backends()]
    return fields


def header_text(header: dict[str, Any]) -> str:
    """The header as two lines."""
    if "empty_kernel_us" in header:
        return _device_header_text(header)
    ceilings = " | ".join(
        f"{float(rate):.2f} GB/s with {threads} thread" + "s" * (threads != "1")
        for threads, rate in header["ceilings_gb_per_s"].items()
    )
    return (
        f"{header['device']} | {header['threads']} threads | {header['simd_target']} | last cache "
        f"{header['last_cache_bytes'] / _MIB:.0f} MiB | select-attn-ops "
        f"{header['select_attn_ops']} | torch {header['torch']} | Python {header['python']} | "
        f"commit {header['commit'] or 'unknown'}{' | real-time' * header['realtime']}\n"
        f"read ceiling {ceilings}; each case has its own, of its own memory, measured beside it"
    )


def _device_header_text(header: dict[str, Any]) -> str:
    (ceiling,) = header["ceilings_gb_per_s"].values()
    empty = " and ".join(
        f"{time:.2f} us with {blocks} thread block" + "s" * (blocks != "1")
        for blocks, time in header["empty_kernel_us"].items()
    )
    return (
        f"{header['device']} | last cache {header['last_cache_bytes'] / _MIB:.0f} MiB | "
        f"select-attn-ops {header['select_attn_ops']} | torch {header['torch']} | Python "
        f"{header['python']} | commit {header['commit'] or 'unknown'}\n"
        f"read ceiling {ceiling:.1f} GB/s; each case has its own, measured beside it | times are "
        "of a graph's node" + (f"; an empty kernel takes {empty}" if empty else "")
    )


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def case_text(result: Result) -> str:
    """The line of a case."""
    what = f"{result.shape}, {result.dtype}"
    if result.device_type == "cpu":
        what += f", {result.threads} thread" + "s" * (result.threads != 1)
        if result.simd_target != runtime.simd_target():
            what += f", {result.simd_target}"
    label = f"{result.label}: " if result.label else ""
    parts = [
        f"{label}{result.operator} ({what}): {time_text(result.seconds.median)}",
        f"{result.rate / 1e9:.2f} GB/s",
        f"{result.share.median:.3f} [{result.share.low:.3f}, {result.share.high:.3f}] of the "
        f"ceiling {result.ceiling_rate / 1e9:.2f} ({result.ceiling_way})",
    ]
    best = result.best_alternative
    if best is not None:
        parts.append(f"{result.alternatives[best] / result.seconds.median:.1f}x {best}")
    parts += [f"no {name}: {why}" for name, why in result.skipped.items()]
    if result.disturbed:
        parts.append("THE MACHINE WAS BUSY: it reads long tensors more than twice as fast")
    elif not result.credible:
        parts.append("THE CEILING IS WRONG: the operator is faster than a read of its memory")
    return " | ".join(parts)


# What the shares of the ceiling should be at least.
SHARES = {
    "line 1": 0.95,
    "line 2": 0.95,
    "line 3": 0.90,
    "line 4": 0.90,
    "line 5": 0.85,
    "line 10": 0.90,
    "line 11": 0.80,
    "gpu 1": 0.90,
    "gpu 2": 0.92,
}
# What a call should take at most, in microseconds.
TIMES = {"gpu 3": 8.0, "gpu 4": 6.0, "gpu 5": 16.0, "gpu 6": 6.0}


def _row(label: str, what: str, value: str, limit: str, met: bool | None) -> str:
    verdict = {True: "met", False: "MISSED", None: "unknown"}[met]
    return f"{label:8}{value:>12}  {limit:12}{verdict:9}{what}"


def table_text(
    results: Sequence[Result], findings: Sequence[Finding], *, verdicts: bool = True
) -> str:
    """The table of speed: the figures that have a target, beside it, and whether they meet it."""
    rows = []
    for result in results:
        what = f"{result.operator}, {result.dtype}, "
        if result.device_type == "cpu":
            what += f"threads: {result.threads}, "
        what += result.shape
        met: bool | None
        if result.label in SHARES:
            target, share = SHARES[result.label], result.share.median
            value, limit, met = f"{share:.3f}", f">= {target:.2f}", share >= target
        elif result.label in TIMES:
            target, time = TIMES[result.label], result.seconds.median * 1e6
            value, limit, met = f"{time:.3f} us", f"<= {target:.2f} us", time <= target
        else:
            continue
        # What a GPU should do says nothing about a processor.
        for_another = result.label.startswith("gpu") and result.device_type == "cpu"
        if for_another or not (verdicts and result.credible):
            met = None
        row = _row(result.label, what, value, limit, met)
        rows.append((int(result.label.split()[1]), row))
    for finding in findings:
        limit = f"<= {finding.limit:.2f} {finding.unit}"
        met = None
        if verdicts and finding.value is not None:
            met = finding.value <= finding.limit
        value = "-" if finding.value is None else f"{finding.value:.3f} {finding.unit}"
        what = finding.what + (f" ({finding.note})" if finding.note else "")
        row = _row(finding.label, what, value, limit, met)
        rows.append((int(finding.label.split()[1]), row))
    rows.sort(key=lambda row: row[0])
    return "\n".join(["", "the table of speed", *(row for _, row in rows)]) if rows else ""


def case_json(result: Result) -> dict[str, Any]:
    """A case for programs."""
    best = result.best_alternative
    return {
        "label": result.label,
        "operator": result.operator,
        "shape": result.shape,
        "dtype": result.dtype,
        "threads": result.threads,
        "simd_target": result.simd_target,
        "seconds": asdict(result.seconds),
        "bytes": result.bytes_per_call,
        "gb_per_s": result.rate / 1e9,
        "ceiling": {"gb_per_s": result.ceiling_rate / 1e9, "way": result.ceiling_way},
        "share": asdict(result.share),
        "credible": result.credible,
        "disturbed": result.disturbed,
        "alternatives": result.alternatives,
        "skipped": result.skipped,
        "speedup": None if best is None else result.alternatives[best] / result.seconds.median,
        "sets": result.sets,
        "rounds": result.rounds,
    }


def write_json(
    path: Path, header: dict[str, Any], results: Sequence[Result], findings: Sequence[Finding]
) -> None:
    """Write a run for programs."""
    run = {
        "schema": SCHEMA,
        "header": header,
        "cases": [case_json(result) for result in results],
        "findings": [asdict(finding) for finding in findings],
    }
    path.write_text(json.dumps(run, indent=2) + "\n")

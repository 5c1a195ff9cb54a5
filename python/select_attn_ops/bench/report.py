"""What a run says: to people a line per case, to programs JSON."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__, runtime
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


def header(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures of a run depend on."""
    return {
        "device": device_text(device),
        "threads": threads,
        "simd_target": runtime.simd_target(),
        "simd_targets": runtime.simd_targets(),
        "last_cache_bytes": last_cache_bytes(),
        "select_attn_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
    }


def header_text(header: dict[str, Any]) -> str:
    """The header as a line."""
    return (
        f"{header['device']} | {header['threads']} threads | {header['simd_target']} | last cache "
        f"{header['last_cache_bytes'] / _MIB:.0f} MiB | select-attn-ops "
        f"{header['select_attn_ops']} | torch {header['torch']} | Python {header['python']} | "
        f"commit {header['commit'] or 'unknown'}"
    )


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def case_text(result: Result) -> str:
    """The line of a case."""
    spec = result.spec
    threads = f"{result.threads} thread" + "s" * (result.threads != 1)
    parts = [
        f"{spec.label}: {spec.shape.operator} ({spec.shape}, {spec.dtype}, {threads}"
        + (f", {spec.simd_target}" if spec.simd_target else "")
        + f"): {time_text(result.seconds.median)}",
        f"{result.rate / 1e9:.2f} GB/s",
        f"{result.share.median:.3f} [{result.share.low:.3f}, {result.share.high:.3f}] of the "
        f"ceiling {result.ceiling_rate / 1e9:.2f} ({result.ceiling_way})",
    ]
    best = result.best_alternative
    if best is not None:
        parts.append(f"{result.alternatives[best] / result.seconds.median:.1f}x {best}")
    parts += [f"no {name}: {why}" for name, why in result.skipped.items()]
    if not result.credible:
        parts.append("THE CEILING IS WRONG: a kernel is faster than the best read of its memory")
    return " | ".join(parts)


def case_json(result: Result) -> dict[str, Any]:
    """A case for programs."""
    shape = asdict(result.spec.shape)
    shape["seq_lens"] = list(shape["seq_lens"])
    return {
        "label": result.spec.label,
        "operator": shape.pop("operator"),
        "shape": shape,
        "dtype": result.spec.dtype,
        "threads": result.threads,
        "simd_target": result.simd_target,
        "seconds": asdict(result.seconds),
        "bytes": result.bytes_per_call,
        "gb_per_s": result.rate / 1e9,
        "ceiling": {"gb_per_s": result.ceiling_rate / 1e9, "way": result.ceiling_way},
        "share": asdict(result.share),
        "credible": result.credible,
        "alternatives": result.alternatives,
        "skipped": result.skipped,
        "sets": result.sets,
        "rounds": result.rounds,
    }


def write_json(path: Path, header: dict[str, Any], results: Sequence[Result]) -> None:
    """Write a run as JSON."""
    run = {"schema": SCHEMA, "header": header, "cases": [case_json(each) for each in results]}
    path.write_text(json.dumps(run, indent=2) + "\n")

"""Timing and printing of benchmarks."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import select_attn_ops
import torch

from .devices import device_or_exit, script_parser, synchronize

_DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MIB = 1 << 20


class Benchmark:
    """One run of a benchmark script; prints the header when made, then a line per case.

    Parameters
    ----------
    description : str
        Shown by ``--help``.
    """

    def __init__(self, description: str) -> None:
        parser = script_parser(description)
        parser.add_argument("--quick", action="store_true", help="few shapes, short measurement")
        parser.add_argument(
            "--dtype", nargs="+", choices=_DTYPE_NAMES, help="default: bf16 fp16 (--quick: bf16)"
        )
        options: argparse.Namespace = parser.parse_args()
        self.quick: bool = options.quick
        names = options.dtype or (["bf16"] if self.quick else ["bf16", "fp16"])
        self.dtypes = [_DTYPE_NAMES[name] for name in names]
        # The last caches of servers are large; what is rotated through is printed per case.
        self.rotate_bytes = (128 if self.quick else 1024) * _MIB
        self.device = device_or_exit(options.device)
        self.dot_rate = self._dot_rate()
        print(
            f"device {_device_text(self.device)} | threads {select_attn_ops.get_num_threads()} "
            f"(torch {torch.get_num_threads()}) | torch {torch.__version__} | select_attn_ops "
            f"{select_attn_ops.__version__} | commit {_commit()}"
        )
        print(
            f"torch.dot reads {self.dot_rate / 1e9:.1f} GB/s; medians of interleaved "
            "rounds; GB/s of what must be read and written"
        )

    def rotations(self, bytes_per_call: int) -> int:
        """Return how many sets of inputs to go through, one after another."""
        return max(1, min(256, self.rotate_bytes // bytes_per_call))

    def case(
        self,
        name: str,
        shape: str,
        dtype: torch.dtype,
        operator: Callable[[int], object],
        reference: Callable[[int], object],
        rotations: int,
        bytes_per_call: int,
    ) -> None:
        """Measure one case and print its line.

        Parameters
        ----------
        name, shape, dtype
            What the line says.
        operator, reference : callable
            Run on the inputs of a rotation, whose number they get.
        rotations : int
            Number of sets of inputs.
        bytes_per_call : int
            Bytes that one call must read and write.
        """
        seconds, reference_seconds = self._measure(operator, reference, rotations)
        rate = bytes_per_call / seconds
        short = next(key for key, value in _DTYPE_NAMES.items() if value == dtype)
        print(
            f"{name} ({shape}, {short}): {seconds * 1e6:.1f} us | {rate / 1e9:.2f} GB/s "
            f"({rate / self.dot_rate:.0%} of torch.dot) | {reference_seconds / seconds:.1f}x "
            f"torch reference | {rotations} inputs, {rotations * bytes_per_call / _MIB:.0f} MiB",
            flush=True,
        )

    def _measure(
        self,
        operator: Callable[[int], object],
        reference: Callable[[int], object],
        rotations: int,
    ) -> tuple[float, float]:
        """Return the median seconds of both."""
        operator(0)
        reference(0)
        rounds, budget, least = (2, 0.03, 3) if self.quick else (5, 0.2, 10)
        taken: list[float] = []
        reference_taken: list[float] = []
        for _ in range(rounds):
            spent, calls = 0.0, 0
            while calls < least or spent < budget:
                taken.append(self._time(lambda: operator(len(taken) % rotations)))
                spent, calls = spent + taken[-1], calls + 1
            turn = len(reference_taken) % rotations
            reference_taken.append(self._time(lambda turn=turn: reference(turn)))
        return statistics.median(taken), statistics.median(reference_taken)

    def _time(self, call: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        module = getattr(torch, self.device.type)
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _dot_rate(self) -> float:
        """Return the bytes per second at which torch reads two long vectors."""
        # Ones, because pages of zeros may all be the same page.
        vectors = [
            torch.ones(self.rotate_bytes // 8, dtype=torch.float32, device=self.device)
            for _ in range(2)
        ]
        torch.dot(*vectors)
        synchronize(self.device)
        taken = [self._time(lambda: torch.dot(*vectors)) for _ in range(10)]
        return self.rotate_bytes / min(taken)


def _device_text(device: torch.device) -> str:
    if device.type != "cpu":
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "cpu (" + next(line for line in lines if "model name" in line).split(": ")[1] + ")"
    except (OSError, StopIteration, IndexError):
        return "cpu"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

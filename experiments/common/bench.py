"""Benchmarks of the experiments: the package's own measurement, with the oracles as baseline."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from select_attn_ops.bench import report
from select_attn_ops.bench.cases import DTYPES, Case
from select_attn_ops.bench.measuring import QUICK, THOROUGH
from select_attn_ops.bench.runner import Runner

from .devices import device_or_exit, script_parser

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def part_of(pool: torch.Tensor, number: int, blocks: int) -> torch.Tensor:
    """Return as many blocks of a pool as a rotation reads, others for every rotation.

    Whose they are does not matter to the speed of a read.
    """
    return pool[number * blocks : (number + 1) * blocks]


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
            "--dtype", nargs="+", choices=[*DTYPES], help="default: bf16 fp16 (--quick: bf16)"
        )
        options: argparse.Namespace = parser.parse_args()
        self.quick: bool = options.quick
        names = options.dtype or (["bf16"] if self.quick else ["bf16", "fp16"])
        self.dtypes = [DTYPES[name] for name in names]
        self.device = device_or_exit(options.device)
        self._runner = Runner(self.device, QUICK if self.quick else THOROUGH)
        print(report.header_text(report.header(self.device, self._runner.read_rates())))

    def rotations(self, bytes_per_call: int) -> int:
        """Return how many sets of inputs to go through, one after another."""
        return max(1, min(64, -(-self._runner.rotated_bytes // bytes_per_call)))

    def case(
        self,
        name: str,
        shape: str,
        dtype: torch.dtype,
        operator: Callable[[int], object],
        reference: Callable[[int], object],
        touched: Sequence[Sequence[torch.Tensor]],
        bytes_per_call: int,
        check: Callable[[], None],
    ) -> None:
        """Measure one case and print its line.

        Parameters
        ----------
        name, shape, dtype
            What the line says.
        operator, reference : callable
            Run on the inputs of a rotation, whose number they get.
        touched : sequence of sequence of torch.Tensor
            Per rotation, memory like that of its inputs, whose read is the ceiling.
        bytes_per_call : int
            Bytes that one call must read and write.
        check : callable
            Runs the operator once, and raises if its result is wrong.
        """

        def calls(function: Callable[[int], object]) -> list[Callable[[], object]]:
            return [functools.partial(function, turn) for turn in range(len(touched))]

        case = Case(
            operator=name,
            shape=shape,
            dtype=_DTYPE_NAMES[dtype],
            calls=calls(operator),
            touched=touched,
            bytes_per_call=bytes_per_call,
            alternatives=lambda compiled: {"torch reference": lambda: calls(reference)},
            check=check,
        )
        with self._runner.setting():
            print(report.case_text(self._runner.measure(case)), flush=True)

"""scripts/gpu.sh without a GPU, and with a python that pretends to have one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu.sh"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")

# Notes how it is called; `FAILS` is a part of the arguments with which it fails.
PYTHON = """#!/bin/sh
echo "$*" | tr '\\n' ' ' >> "$LOG"; echo >> "$LOG"
case "$*" in
  *triton*) exit 1 ;;
  *__path__*) echo "$LOG" ;;
  *info) echo "backend cuda: ${BACKEND:-available (a GPU)}" ;;
  *"--suite gpu "*limit*) printf 'the table of speed\\ngpu 1  0.5  MISSED\\n' ;;
  *"$FAILS"*) echo "it breaks"; exit 7 ;;
esac
"""
SANITIZER = """#!/bin/sh
while [ "$1" != --log-file ]; do
  if [ "$1" = --tool ]; then tool=$2; fi
  shift
done
echo "$REPORT" > "$2"
if [ "$tool" = "$FINDS" ]; then exit 9; fi
"""
CUOBJDUMP = """#!/bin/sh
echo "Function a: REG:40 STACK:0"
echo "Function b: REG:128 STACK:16"
"""


class Machine:
    """A copy of the script in an empty repository, and programs that pretend."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a repo"
        self.bin = folder / "bin"
        (self.root / "scripts").mkdir(parents=True)
        (self.root / "tests").mkdir()
        (self.root / "tests" / "test_cuda.py").touch()
        self.bin.mkdir()
        shutil.copy(SCRIPT, self.root / "scripts")
        self.log = folder / "log"
        self.program("python", PYTHON)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": f"{self.bin}:{os.defpath}",
            "PYTHON": str(self.bin / "python"),
            "LOG": str(self.log),
            "CUDA_HOME": "/nowhere",
            "FAILS": "nothing that is ever said",
            **env,
        }
        return subprocess.run(
            [str(BASH), str(self.root / "scripts" / "gpu.sh"), *arguments],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> str:
        return self.log.read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def summary(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the outcome of every part by its name."""
    lines = run.stdout.split("== summary")[1].split("the table of speed")[0].splitlines()[1:]
    return {line.split("  ")[0]: line[24:].strip() for line in lines}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(machine: Machine) -> None:
    run = machine.run(PYTHON=sys.executable)
    assert run.returncode == 3
    assert run.stdout == ""
    assert run.stderr.startswith("gpu.sh: nothing was run, for there is no GPU here: torch ")
    assert run.stderr.endswith("finds no CUDA device\n")
    assert not (machine.root / "out").exists()


def test_all_is_well(machine: Machine) -> None:
    machine.program("compute-sanitizer", SANITIZER)
    machine.program("cuobjdump", CUOBJDUMP)
    run = machine.run("the.whl", FINDS="none")
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes = summary(run)
    assert [*outcomes] == [
        *("install", "info", "experiments", "tests", "lines"),
        *("memcheck", "racecheck", "initcheck", "synccheck", "resources", "shapes"),
    ]
    assert {outcome.split()[0] for outcome in outcomes.values()} == {"passed"}
    assert run.stdout.endswith("the table of speed\ngpu 1  0.5  MISSED\n")
    assert "with a stack: 1" in run.stdout
    assert "most registers: REG:128" in run.stdout
    assert "the.whl" in machine.calls()
    assert "--device cuda --suite gpu --limit-seconds" in machine.calls()
    assert (machine.root / "out" / "gpu" / "lines.log").exists()


def test_what_fails_does_not_stop_the_rest(machine: Machine) -> None:
    run = machine.run(FAILS="-m pytest -q --device", OUT="elsewhere")
    assert run.returncode == 1
    outcomes = summary(run)
    assert outcomes["experiments"].startswith("FAILED with status 7 after ")
    assert outcomes["sanitizer"] == "skipped: compute-sanitizer was not found"
    assert outcomes["resources"] == "skipped: cuobjdump was not found"
    assert outcomes["shapes"].startswith("passed")
    assert "it breaks" in run.stdout
    assert "it breaks" in (machine.root / "elsewhere" / "experiments.log").read_text()


@pytest.mark.parametrize(
    ("tool", "report", "outcome"),
    [
        ("memcheck", "Invalid __global__ read", "FAILED with status 9"),
        ("initcheck", "Uninitialized read in at::native::copy", "passed"),
        ("initcheck", "Uninitialized read in select_attn::cuda", "FAILED with status 1"),
        ("racecheck", "Error: Device not supported", "skipped: it does not accept this device"),
    ],
)
def test_what_the_sanitizer_finds(machine: Machine, tool: str, report: str, outcome: str) -> None:
    machine.program("compute-sanitizer", SANITIZER)
    run = machine.run(FINDS=tool, REPORT=report)
    assert summary(run)[tool].startswith(outcome)
    assert run.returncode == ("FAILED" in outcome)


def test_a_package_without_the_backend(machine: Machine) -> None:
    run = machine.run(BACKEND="not available (the driver is old)")
    assert run.returncode == 1
    assert "not available (the driver is old)" in run.stdout
    assert "no usable CUDA backend" in summary(run)["backend"]
    assert "bench" not in machine.calls()


def test_out_of_time(machine: Machine) -> None:
    run = machine.run(SELECT_ATTN_GPU_SECONDS="1")
    assert run.returncode == 1
    assert "FAILED: no time was left" in run.stdout


@pytest.mark.parametrize("arguments", [("a", "b"), ("--help",)])
def test_usage(machine: Machine, arguments: tuple[str, ...]) -> None:
    run = machine.run(*arguments)
    assert run.returncode == 2
    assert "usage: bash scripts/gpu.sh [wheel]" in run.stderr


def test_make_gpu_says_so() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    done = subprocess.run(
        [make, "-n", "-C", str(SCRIPT.parents[1]), "gpu", "WHEEL=some.whl"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bash scripts/gpu.sh some.whl" in done.stdout

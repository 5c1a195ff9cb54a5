"""The build of the Ascend backend, on machines with a CANN made of a few fake files.

Its runtime is the fake one of the C++ tests, its compiler a script that notes its arguments and
makes a library of empty launches. So the host side is compiled and linked as it ships.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE_ACL = ROOT / "tests" / "cpp" / "fake_acl"
CMAKE = Path(sys.executable).parent / "cmake"
CXX = shutil.which("c++") or ""

pytestmark = pytest.mark.skipif(not CXX or not CMAKE.exists(), reason="no compiler or CMake")

# Notes its arguments, a line each, and compiles the stub.
BISHENG = """#!/bin/bash
printf '%s\\n' "$@" > "{log}"
while [[ $1 != -o ]]; do shift; done
exec "{cxx}" -std=c++17 -shared -fPIC -I"{root}/include" -I"{root}/kernels" -x c++ "{stub}" -o "$2"
"""


class Cann:
    """A CANN's folder, with its files where one with or without the language ASC has them."""

    def __init__(self, folder: Path, *, asc_language: bool) -> None:
        self.home = folder / "cann with a space"
        self.log = folder / "bisheng.log"
        self.build_folder = folder / "build"
        architecture = f"{platform.machine()}-linux"
        shutil.copytree(FAKE_ACL / "acl", self.home / "include" / "acl")
        (self.home / "lib64").mkdir()
        for name in ("ascendcl", "runtime"):
            source = FAKE_ACL / "fake_acl.cc" if name == "ascendcl" else "/dev/null"
            library = self.home / "lib64" / f"lib{name}.so"
            self.run(
                *(CXX, "-std=c++17", "-shared", "-fPIC", f"-I{FAKE_ACL}"),
                *("-x", "c++", source, "-o", library),
            )
        if asc_language:
            (self.home / "lib64" / "cmake").mkdir()
            (self.home / "lib64" / "cmake" / "asc-config.cmake").write_text("")
            bisheng = self.home / architecture / "ccec_compiler" / "bin" / "bisheng"
        else:
            bisheng = self.home / "compiler" / "ccec_compiler" / "bin" / "bisheng"
        stub = folder / "stub.cc"
        stub.write_text(stub_of_launches())
        bisheng.parent.mkdir(parents=True)
        bisheng.write_text(BISHENG.format(log=self.log, cxx=CXX, root=ROOT, stub=stub))
        bisheng.chmod(0o755)

    @staticmethod
    def run(*command: str | Path, **env: str) -> None:
        result = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"

    def build(self, **env: str) -> None:
        dlpack = subprocess.run(
            [sys.executable, "-m", "tvm_ffi.config", "--dlpack-includedir"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        self.run(
            *(CMAKE, "-S", ROOT, "-B", self.build_folder, "-DSELECT_ATTN_ASCEND=ON"),
            *("-DSELECT_ATTN_WERROR=ON", f"-DSELECT_ATTN_DLPACK_INCLUDE_DIR={dlpack}"),
            ASCEND_HOME_PATH=str(self.home),
            **env,
        )
        self.run(CMAKE, "--build", self.build_folder, "--target", "select_attn_ops_ascend")

    def arguments(self) -> list[str]:
        return self.log.read_text().splitlines()


def stub_of_launches() -> str:
    header = (ROOT / "kernels" / "ascend" / "launch.h").read_text()
    declarations = re.findall(r"^void [^;]+\);", header, re.MULTILINE)
    assert len(declarations) == 4
    bodies = "\n".join(declaration.replace(";", " {}") for declaration in declarations)
    return f'#include "ascend/launch.h"\nnamespace select_attn::ascend {{\n{bodies}\n}}\n'


def test_cann_9_compiles_kernels_as_its_language(tmp_path: Path) -> None:
    cann = Cann(tmp_path, asc_language=True)
    cann.build(SOC_VERSION="")
    arguments = cann.arguments()
    assert {"-shared", "-fPIC", "--npu-arch=dav-2201"} <= set(arguments)
    assert "-xcce" not in arguments
    assert str(ROOT / "kernels" / "ascend" / "launch.asc") in arguments
    check_that_the_backend_loads(cann)


def test_cann_8_compiles_kernels_as_cce(tmp_path: Path) -> None:
    cann = Cann(tmp_path, asc_language=False)
    cann.build(SOC_VERSION="Ascend910B4")
    arguments = cann.arguments()
    assert {"-shared", "-fPIC", "-xcce", "--cce-soc-core-type=VecCore"} <= set(arguments)
    assert "--cce-soc-version=Ascend910B4" in arguments
    assert "-DSELECT_ATTN_ASC_LANGUAGE" not in arguments
    check_that_the_backend_loads(cann)


def check_that_the_backend_loads(cann: Cann) -> None:
    """Open it beside its kernels, as the core library does, with CANN's libraries on their path."""
    script = """
import ctypes, sys
backend = ctypes.CDLL(sys.argv[1])
backend.select_attn_ops_backend.restype = ctypes.c_void_p
why = ctypes.c_char_p()
assert backend.select_attn_ops_backend(ctypes.byref(why)), why.value
"""
    library = cann.build_folder / "libselect_attn_ops_ascend.so"
    path = str(cann.home / "lib64")
    cann.run(sys.executable, "-c", script, library, LD_LIBRARY_PATH=path)

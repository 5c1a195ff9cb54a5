"""What users install: the wheel, the C++ package, and what both promise to load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import select_attn_ops

ROOT = Path(__file__).resolve().parents[1]

# What the binding takes from tvm-ffi. Its C++ headers have changed within a minor version: a name
# that is new here may be missing in the oldest version that the package claims to run with.
TVM_FFI_SYMBOLS = {
    "TVMFFIBacktrace",
    "TVMFFIEnvGetStream",
    "TVMFFIErrorSetRaised",
    "TVMFFIGetTypeInfo",
}
OLDEST_TVM_FFI = "0.1.9"

# Highest version of the C library that the wheel may need: Debian 12's.
NEWEST_GLIBC = (2, 36)

EXAMPLE = """
import numpy as np
from select_attn_ops import quest_block_select_paged
metadata = np.zeros((1, 16, 1, 64), np.float16)
metadata[0, :3, 0] = [[1], [3], [2]]
selected = quest_block_select_paged(
    np.ones((1, 2, 64), np.float16), metadata, metadata,
    np.zeros((1, 1), np.int32), np.array([40], np.int32), k=4,
)
assert selected.tolist() == [[[1, 2, 0, -1]]], selected
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(*(path for path in libraries if "libhwy" in path), sep="\\n")
"""


def run(*command: str | Path, **options: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = list((ROOT / "dist").glob("*.whl"))
    assert len(wheels) == 1, "run `make wheel` first"
    return wheels[0]


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """Python of an environment that holds the wheel and what it depends on, nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel)
    return python


def without_compiler(python: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PATH": str(python.parent)}


def test_wheel_is_for_every_python(wheel: Path) -> None:
    match = re.fullmatch(r"select_attn_ops-([0-9.]+)-py3-none-(manylinux_\S+)\.whl", wheel.name)
    assert match is not None, wheel.name
    assert match[1] == select_attn_ops.__version__
    glibc = re.findall(r"manylinux_(\d+)_(\d+)", match[2])
    assert all((int(major), int(minor)) <= NEWEST_GLIBC for major, minor in glibc)


def test_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "lib/libselect_attn_ops.so", "lib/libselect_attn_ops_ffi.so"):
        assert f"select_attn_ops/{name}" in names
    top = {name.split("/")[0] for name in names}
    version = select_attn_ops.__version__
    assert top <= {
        "select_attn_ops",
        f"select_attn_ops-{version}.dist-info",
        "select_attn_ops.libs",
    }
    assert not any("libtvm_ffi" in name for name in names)
    assert not any("cuda" in name for name in names), "that is for `make cuda-all`"


def test_wheel_imports_without_numpy_and_torch(empty_environment: Path) -> None:
    text = run(
        empty_environment, "-m", "select_attn_ops", "info", env=without_compiler(empty_environment)
    )
    assert f"select-attn-ops {select_attn_ops.__version__}" in text
    assert "torch: not installed" in text
    assert "numpy: not installed" in text


def test_wheel_works_without_a_compiler_and_brings_highway(empty_environment: Path) -> None:
    run(empty_environment, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "numpy")
    libraries = run(
        empty_environment, "-c", EXAMPLE, env=without_compiler(empty_environment)
    ).split()
    # Linked statically where the build downloaded it: then there is none to load.
    assert all("select_attn_ops.libs" in path for path in libraries), libraries


def test_binding_needs_only_known_symbols_of_tvm_ffi() -> None:
    binding = Path(select_attn_ops.__file__).parent / "lib" / "libselect_attn_ops_ffi.so"
    symbols = set(
        re.findall(r"\bU (TVMFFI\w+)", run("nm", "--dynamic", "--undefined-only", binding))
    )
    assert symbols == TVM_FFI_SYMBOLS


def test_library_exports_only_its_interface() -> None:
    folder = Path(select_attn_ops.__file__).parent / "lib"
    listing = run(
        "nm", "--dynamic", "--defined-only", "--demangle", folder / "libselect_attn_ops.so"
    )
    ours = [line.split(maxsplit=2)[2] for line in listing.splitlines() if " T " in line]
    functions = {name.split("(")[0] for name in ours}
    assert {name for name in functions if not name.startswith("select_attn::")} <= {
        "_init",
        "_fini",
    }
    assert "select_attn::QuestBlockSelectPaged" in functions
    assert not any("::cpu::" in name or "Check" in name for name in functions)


def test_cuda_backend_needs_nothing_and_exports_its_table() -> None:
    backend = Path(select_attn_ops.__file__).parent / "lib" / "libselect_attn_ops_cuda.so"
    if not backend.exists():
        pytest.skip("the package was built without the CUDA backend")
    listing = run("nm", "--dynamic", "--defined-only", backend)
    assert [line.split()[-1] for line in listing.splitlines()] == ["select_attn_ops_backend"]
    # The driver is opened when it is first needed; the runtime is inside.
    undefined = run("nm", "--dynamic", "--undefined-only", backend)
    assert not re.findall(r"\bU (cu\w+|TVMFFI\w+)", undefined)


def test_build_uses_the_oldest_supported_tvm_ffi() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"apache-tvm-ffi=={OLDEST_TVM_FFI}"' in text
    assert f'"apache-tvm-ffi>={OLDEST_TVM_FFI},<0.2"' in text


def test_oldest_tvm_ffi_runs_the_package(empty_environment: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    run(
        *(empty_environment, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"),
        *("--target", packages, f"apache-tvm-ffi=={OLDEST_TVM_FFI}", "numpy"),
    )
    environment = without_compiler(empty_environment) | {"PYTHONPATH": str(packages)}
    check = f"import tvm_ffi; assert tvm_ffi.__version__.startswith({OLDEST_TVM_FFI!r})"
    run(empty_environment, "-c", f"{check}\n{EXAMPLE}", env=environment)


def test_find_package(tmp_path: Path) -> None:
    build = ROOT / "build" / "test"
    assert (build / "CMakeCache.txt").exists(), "run `make build-cpp-test` first"
    cmake = Path(sys.executable).parent / "cmake"
    dlpack = run(sys.executable, "-m", "tvm_ffi.config", "--dlpack-includedir").strip()
    prefix = tmp_path / "prefix"
    run(cmake, "--install", build, "--prefix", prefix, "--component", "development")
    assert (prefix / "include" / "select_attn_ops" / "quest_prefill_metadata.h").exists()
    run(
        *(cmake, "-S", ROOT / "tests" / "consumer", "-B", tmp_path / "build"),
        *(f"-DCMAKE_PREFIX_PATH={prefix}", f"-DSELECT_ATTN_DLPACK_INCLUDE_DIR={dlpack}"),
    )
    run(cmake, "--build", tmp_path / "build")
    assert run(tmp_path / "build" / "consumer").splitlines() == [
        f"{select_attn_ops.__version__}: 1 2 0 -1",
        "ValueError: seq_lens[0] must be at most 16 outside the window, what "
        "metadata_block_tables holds, got 17",
    ]

"""scripts/init_cann.sh and scripts/build_kernels.sh, on machines made of a few fake files."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
MODELS = ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")


def bash(script: str, *arguments: str | Path, **env: str | Path) -> subprocess.CompletedProcess:
    """Run a bash command with nothing in the environment but PATH and ``env``."""
    variables = {"PATH": os.defpath, **{name: str(value) for name, value in env.items()}}
    return subprocess.run(
        [BASH, "-c", script, "bash", *map(str, arguments)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def write(path: Path, text: str, *, executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(0o755)
    return path


# --- init_cann.sh

# Reads an unset variable, ignores a failure and uses plain names, as vendors' scripts do.
SET_ENV = """
arch=wrong; model=wrong; folder=wrong; home=wrong; options=wrong
false
export ASCEND_HOME_PATH="{folder}/latest" FAKE_ARGUMENTS=$#
export LD_LIBRARY_PATH="{folder}/latest/lib64:$LD_LIBRARY_PATH"
"""
SOURCE = f'source "{SCRIPTS}/init_cann.sh"'
# What the shell holds, but for what every command changes.
STATE = (
    "{ set; export -p; set -o; declare -F; } | "
    "grep -vE '^(_|BASH_|FUNCNAME|PIPESTATUS|LINENO|status)'"
)


def make_cann(folder: Path, set_env: str = SET_ENV, version: str = "8.2.RC2") -> Path:
    write(folder / "set_env.sh", set_env.format(folder=folder))
    write(
        folder / "latest" / f"{platform.machine()}-linux" / "ascend_toolkit_install.info",
        f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100\n",
    )
    return folder


def fails_and_changes_nothing(command: str, **env: str | Path) -> str:
    """Source the script in vain; return what it printed on stderr."""
    run = bash(
        f"before=$({STATE}); {command} && exit 99; status=$?; "
        f'[[ $({STATE} | grep -v ^before=) == "$before" ]] || exit 98; echo "status $status"',
        **env,
    )
    assert run.returncode == 0, run
    assert run.stdout == "status 1\n"
    return run.stderr


@pytest.mark.parametrize("model", MODELS)
def test_init_cann_sets_the_environment(model: str, tmp_path: Path) -> None:
    cann = make_cann(tmp_path / "ascend-toolkit")
    run = bash(f'{SOURCE} {model} && echo "status $?" && env', ASCEND_HOME_PATH=cann)
    assert run.returncode == 0, run.stderr
    assert f"CANN 8.2.RC2 in {cann}/latest" in run.stdout
    assert f"{model}, 2" in run.stdout  # the AI cores
    lines = run.stdout.splitlines()
    assert f"SOC_VERSION={model}" in lines
    assert "CMAKE_ASC_ARCHITECTURES=dav-2201" in lines
    assert f"ASCEND_HOME_PATH={cann}/latest" in lines
    assert f"LD_LIBRARY_PATH={cann}/latest/lib64:" in lines
    assert "FAKE_ARGUMENTS=0" in lines
    assert run.stderr == ""


def test_init_cann_keeps_shell_options_and_leaves_no_function(tmp_path: Path) -> None:
    cann = make_cann(tmp_path / "ascend-toolkit")
    run = bash(
        f'set -eu; {SOURCE} Ascend910B4 >/dev/null; echo "$-"; declare -F',
        ASCEND_TOOLKIT_HOME=cann,
    )
    assert run.returncode == 0, run.stderr
    assert {"e", "u"} <= set(run.stdout.splitlines()[0])
    assert len(run.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value", "folder"),
    [
        ("ASCEND_HOME_PATH", "cann", "cann"),
        ("ASCEND_HOME_PATH", "toolkit/latest", "toolkit"),
        ("ASCEND_TOOLKIT_HOME", "toolkit/latest", "toolkit"),
        ("HOME", "", "Ascend/ascend-toolkit"),
        ("HOME", "", "Ascend/cann"),
    ],
)
def test_init_cann_finds_cann(variable: str, value: str, folder: str, tmp_path: Path) -> None:
    if variable == "HOME" and Path("/usr/local/Ascend").exists():
        pytest.skip("this machine has a CANN, which comes first")
    cann = make_cann(tmp_path / folder)
    run = bash(f"{SOURCE} Ascend910B2", **{variable: tmp_path / value})
    assert run.returncode == 0, run.stderr
    assert f"in {cann}/latest" in run.stdout


def test_init_cann_without_a_version_file(tmp_path: Path) -> None:
    cann = make_cann(tmp_path / "cann")
    shutil.rmtree(cann / "latest")
    run = bash(f"{SOURCE} Ascend910B4", ASCEND_HOME_PATH=cann)
    assert run.returncode == 0, run.stderr
    assert "CANN of unknown version in" in run.stdout


def test_init_cann_unknown_model(tmp_path: Path) -> None:
    cann = make_cann(tmp_path / "cann")
    text = fails_and_changes_nothing(f"{SOURCE} Ascend310P3", ASCEND_HOME_PATH=cann)
    assert "unknown model Ascend310P3" in text
    assert all(model in text for model in MODELS)


def test_init_cann_no_model(tmp_path: Path) -> None:
    cann = make_cann(tmp_path / "cann")
    text = fails_and_changes_nothing(SOURCE, ASCEND_HOME_PATH=cann)
    assert "no model given" in text
    assert all(model in text for model in MODELS)


def test_init_cann_executed() -> None:
    run = bash(f'bash "{SCRIPTS}/init_cann.sh" Ascend910B4')
    assert run.returncode == 1
    assert "must be sourced" in run.stderr
    assert "source scripts/init_cann.sh" in run.stderr


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="this machine may have a CANN")
def test_init_cann_without_cann(tmp_path: Path) -> None:
    text = fails_and_changes_nothing(
        f"{SOURCE} Ascend910B4", HOME=tmp_path, ASCEND_HOME_PATH=tmp_path / "nowhere"
    )
    assert "CANN was not found" in text
    for folder in (tmp_path / "nowhere", "/usr/local/Ascend/ascend-toolkit", tmp_path / "Ascend"):
        assert str(folder) in text
    assert "export ASCEND_HOME_PATH=" in text


@pytest.mark.parametrize("end", ["return 1", "exit 3", "exit 0", "unset ASCEND_HOME_PATH"], ids=str)
def test_init_cann_set_env_fails_half_way(end: str, tmp_path: Path) -> None:
    cann = make_cann(tmp_path / "cann", SET_ENV + end + "\n")
    text = fails_and_changes_nothing(f"{SOURCE} Ascend910B4", ASCEND_TOOLKIT_HOME=cann)
    assert f"{cann}/set_env.sh failed or did not set ASCEND_HOME_PATH" in text


# --- build_kernels.sh


class Machine:
    """A copy of the script in an empty repository, and a python that notes its arguments."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repo with a space"
        self.bin = folder / "bin"
        self.log = folder / "log"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(SCRIPTS / "build_kernels.sh", self.root / "scripts")
        self.python = self.program(
            "python", f'printf "%s\\n" "$@" > "{self.log}"; exit $FAKE_STATUS'
        )

    def program(self, name: str, body: str = "") -> Path:
        return write(self.bin / name, f"#!/bin/sh\n{body}\n", executable=True)

    def kernels(self, backend: str) -> None:
        write(self.root / "kernels" / backend / "CMakeLists.txt", "")

    def build(self, *arguments: str, status: int = 0, **env: str) -> subprocess.CompletedProcess:
        env = {"PYTHON": str(self.python), "FAKE_STATUS": str(status), **env}
        env.setdefault("CUDACXX", "no-such-nvcc")
        return bash(f'bash "{self.root}/scripts/build_kernels.sh" "$@"', *arguments, **env)

    def arguments(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_build_kernels_cpu_only(machine: Machine) -> None:
    run = machine.build()
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "cpu: built",
        "cuda: skipped: this version has no CUDA kernels",
        "ascend: skipped: this version has no Ascend kernels",
    ]
    assert machine.arguments() == ["-m", "pip", "install", str(machine.root)]


def test_build_kernels_all(machine: Machine) -> None:
    machine.kernels("cuda")
    machine.kernels("ascend")
    nvcc = machine.program("nvcc")
    run = machine.build(CUDACXX=str(nvcc), ASCEND_HOME_PATH="/cann", SOC_VERSION="Ascend910B4")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["cpu: built", "cuda: built", "ascend: built"]
    assert machine.arguments()[4:] == [
        "-C",
        "cmake.define.SELECT_ATTN_CUDA=ON",
        "-C",
        "cmake.define.SELECT_ATTN_ASCEND=ON",
    ]


def test_build_kernels_finds_nvcc_on_path(machine: Machine) -> None:
    machine.kernels("cuda")
    machine.program("nvcc")
    run = machine.build(CUDACXX="", PATH=f"{machine.bin}:{os.defpath}")
    assert "cuda: built" in run.stdout.splitlines()


def test_build_kernels_says_what_is_missing(machine: Machine) -> None:
    machine.kernels("cuda")
    machine.kernels("ascend")
    run = machine.build(ASCEND_HOME_PATH="/cann")  # but no SOC_VERSION
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "cpu: built",
        "cuda: skipped: no-such-nvcc was not found; put it on PATH or set CUDACXX",
        "ascend: skipped: CANN is not initialised; source scripts/init_cann.sh <model> first",
    ]
    assert machine.arguments()[4:] == []


def test_build_kernels_failure(machine: Machine) -> None:
    run = machine.build(status=3)
    assert run.returncode == 3
    assert run.stdout.splitlines()[0] == "cpu: failed"
    assert "built" not in run.stdout


def test_build_kernels_dry_run(machine: Machine) -> None:
    run = machine.build("--dry-run", "--no-deps")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == f"{machine.python} -m pip install {machine.root} --no-deps"
    assert lines[1] == "cpu: would be built"
    assert not machine.log.exists()


def test_build_kernels_passes_arguments_to_pip(machine: Machine) -> None:
    machine.build("--no-deps", "--target", "a folder")
    assert machine.arguments()[4:] == ["--no-deps", "--target", "a folder"]


def test_build_kernels_takes_python_from_path(machine: Machine) -> None:
    run = machine.build(PYTHON="", PATH=f"{machine.bin}:{os.defpath}")
    assert run.returncode == 0, run.stderr
    assert machine.arguments()[:3] == ["-m", "pip", "install"]


def test_build_kernels_without_python(machine: Machine, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    for name in ("bash", "dirname"):
        (only / name).symlink_to(shutil.which(name))
    run = machine.build(PYTHON="", PATH=str(only))
    assert run.returncode == 1
    assert "no python was found" in run.stderr

"""The documents' code and commands: each is run here, or by CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRANSFORMERS = ROOT / "docs" / "transformers.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])

# Commands that a test must not run: where CI runs them instead, as a file and a text in it. A file
# that is a test runs the command in some way of its own.
RUN_BY_CI = {
    "make bench": ("tests/test_bench.py", "command.main("),
    "make demo": (".ci/run", "make demo"),
    "make lint": (".ci/run", "make lint"),
    "make sanitize": (".ci/run", "make sanitize"),
    "make test": (".ci/run", "make test"),
    "pip install . numpy": ("scripts/build_kernels.sh", '-m pip install "$root"'),
    'pip install ".[transformers]"': ("pyproject.toml", '["torch", "transformers>='),
    "pip install -r requirements.txt": ("Makefile", "-r requirements.txt"),
    "bash scripts/build_kernels.sh": ("Makefile", "bash scripts/build_kernels.sh"),
    "source scripts/init_cann.sh Ascend910B4": ("tests/test_scripts.py", "init_cann.sh"),
    "pytest -v experiments": ("Makefile", "tests experiments"),
    "python -m select_attn_ops bench --profile": ("tests/test_bench.py", '"--profile"'),
    "python -m select_attn_ops bench --suite speed": ("tests/test_bench.py", "command.main("),
    "apt-get install -y g++ libhwy-dev": ("Makefile", "install_packages.sh libhwy-dev"),
}

# What no run can show: tools and devices that CI does not have, and runs that take hours.
NOT_RUN = {
    "conda create -n sa python=3.11.10 -y",
    "conda activate sa",
}


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    return commands_of("\n".join(blocks(document, "bash")))


def commands_of(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+#.*$", "", line).strip() for line in lines)
    return [" ".join(line.split()) for line in stripped if line and not line.startswith("#")]


README_COMMANDS = commands(ROOT / "README.md")


def run(command: str, folder: Path) -> None:
    """Run a command, or see that CI does."""
    if command in RUN_BY_CI:
        file, text = RUN_BY_CI[command]
        assert text in (ROOT / file).read_text()
        return
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_command(command: str) -> None:
    if command in NOT_RUN:
        pytest.skip("needs what CI does not have")
    run(command, ROOT)


def test_exceptions_are_in_a_document() -> None:
    named = {*README_COMMANDS, *commands(TRANSFORMERS), "make lint", "make sanitize"}
    assert set(RUN_BY_CI) | NOT_RUN <= named


@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if blocks(document, "python") and document != TRANSFORMERS],
    ids=lambda document: str(document.relative_to(ROOT)),
)
def test_python_blocks(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of a document's blocks in order, in one namespace."""
    namespace: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block, str(document), "exec"), namespace)


def test_transformers_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, in an empty folder: commands read what the program before them has written."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    found = re.findall(r"^```(\w*)\n(.*?)^```", TRANSFORMERS.read_text(), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} == {"bash", "python"}
    for language, block in found:
        if language == "python":
            exec(compile(block, str(TRANSFORMERS), "exec"), namespace)
        else:
            for command in commands_of(block):
                run(command, tmp_path)
    assert len(namespace["texts"]) == 2
    assert (tmp_path / "recall.png").is_file()


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT))
)
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT))
)
def test_named_files_exist(document: Path) -> None:
    """Scripts that the documents' commands name."""
    for command in commands(document):
        for path in re.findall(r"(?:experiments|scripts|tests)/[\w./]+", command):
            assert (ROOT / path).exists(), command


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda document: document.name
)
def test_named_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

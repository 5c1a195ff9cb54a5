"""The texts that docs/errors.md lists, and those that the source raises."""

from __future__ import annotations

import ast
import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
# What stands for something else: <...>, and two examples of shapes.
VARIES = r"<[^<>]+>|\*, 128, 8, 128|B, H, D"


@functools.cache
def patterns() -> tuple[re.Pattern[str], ...]:
    rows = "\n".join(re.findall(r"^\|.*", DOCUMENT.read_text(), re.MULTILINE))
    # A text of nothing but placeholders, or with no more than a colon, would be nearly any text.
    texts = (
        text for text in re.findall(r"`([^`]+)`", rows) if " " in re.sub(VARIES, "", text).strip()
    )
    return tuple(
        re.compile(".*".join(map(re.escape, re.split(VARIES, text))), re.DOTALL) for text in texts
    )


def is_documented(message: str) -> bool:
    """Whether a row of docs/errors.md has the text of an error."""
    return any(pattern.fullmatch(message) for pattern in patterns())


@contextlib.contextmanager
def raises(error: type[Exception], text: str) -> Iterator[None]:
    """Expect an error, its text word by word, and that it is documented."""
    with pytest.raises(error) as caught:
        yield
    assert str(caught.value) == text
    assert is_documented(text)


def raised_texts(path: Path) -> Iterator[str]:
    """The texts of a Python file's raise statements, with 0 where a value is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield "".join(map(_with_zeros, node.exc.args))


def _with_zeros(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_with_zeros, node.values))
    return "[0]" if "list(" in ast.unparse(node) else "0"

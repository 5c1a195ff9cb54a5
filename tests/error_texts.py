"""The texts that docs/errors.md lists."""

from __future__ import annotations

import functools
import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
# What stands for something else: <...>, and two examples of shapes.
VARIES = r"<[^<>]+>|\*, 128, 8, 128|B, H, D"


@functools.cache
def patterns() -> tuple[re.Pattern[str], ...]:
    rows = "\n".join(re.findall(r"^\|.*", DOCUMENT.read_text(), re.MULTILINE))
    # A text of nothing but placeholders would be any text.
    texts = (text for text in re.findall(r"`([^`]+)`", rows) if " " in text)
    return tuple(
        re.compile(".*".join(re.escape(part) for part in re.split(VARIES, text))) for text in texts
    )


def is_documented(message: str) -> bool:
    """Whether a row of docs/errors.md has the text of an error."""
    return any(pattern.fullmatch(message) for pattern in patterns())

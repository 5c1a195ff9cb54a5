"""Long real text with things to find in it: pass keys, key-value pairs, repeated passages."""

from __future__ import annotations

import functools
import json
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCAB_SIZE = 1024
KEY_LETTERS = 2
VALUE_DIGITS = 4
# Of a repeated passage: tokens that are given, and tokens to be answered.
PASSAGE_GIVEN = 12
PASSAGE_ANSWER = 4
# What a token of a training text is.
NOISE, TEXT, PAIR, PASSAGE = range(4)
# With the number of the stream each is drawn from; 3 is that of texts for perplexity.
TASKS = {"passkey": 0, "pairs": 1, "passage": 2, "letters": 4}
TEXT_STREAM = 3

# A line break with the indentation behind it, a word with the blank before it, a run of blanks, or
# any other sign by itself.
_PIECE = re.compile(r"\n *| ?[A-Za-z_]+| +|.", re.DOTALL)
_NUM_BYTES = 256
# One file of this many is held out from training.
_HELD_OUT = 8
_SKIPPED_FOLDERS = {"__pycache__", "encodings", "node_modules", "site-packages", "test", "tests"}
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
_DIGITS = np.frombuffer(b"0123456789", np.uint8)
_SIGNS = np.concatenate([_LETTERS, _DIGITS]).astype(np.int64)
# A line of its own that no program has.
_MARK = b"\n@"


class Tokenizer:
    """Tokens are bytes, and the most frequent pieces of the text trained on.

    Parameters
    ----------
    pieces : sequence of str
        What tokens 256 and up stand for.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)
        self._numbers = {piece: _NUM_BYTES + i for i, piece in enumerate(self.pieces)}

    @classmethod
    def from_text(cls, texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
        """Take the pieces that save the most tokens."""
        counts = Counter(piece for text in texts for piece in _PIECE.findall(text))
        saved = {p: n * (len(p.encode()) - 1) for p, n in counts.items() if len(p) > 1}
        best = sorted(saved, key=lambda piece: (-saved[piece], piece))
        return cls(best[: vocab_size - _NUM_BYTES])

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls(json.loads(path.read_text("utf-8")))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.pieces, indent=0) + "\n", "utf-8")

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, int64."""
        tokens: list[int] = []
        for piece in _PIECE.findall(text):
            number = self._numbers.get(piece)
            if number is None:
                tokens.extend(piece.encode())
            else:
                tokens.append(number)
        return np.array(tokens, np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        parts = (
            self.pieces[t - _NUM_BYTES].encode() if t >= _NUM_BYTES else bytes([t]) for t in tokens
        )
        return b"".join(parts).decode("utf-8", "replace")


def default_text() -> Path:
    """Folder of the Python standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


@functools.lru_cache(maxsize=4)
def read_texts(folder: Path, held_out: bool) -> list[str]:
    """Programs of a folder, by name: those to train on, or the eighth of them that is held out.

    Which a file belongs to depends on its name alone.
    """
    texts = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(name.parts):
            continue
        if (zlib.crc32(name.as_posix().encode()) % _HELD_OUT == 0) != held_out:
            continue
        try:
            texts.append(path.read_text("utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    return texts


def read_tokens(tokenizer: Tokenizer, folder: Path, held_out: bool) -> np.ndarray:
    """Tokens of all those programs, one behind the other, int64."""
    return tokenizer.encode("\n".join(read_texts(folder, held_out)))


def window_of(text: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """``length`` tokens of the text from a random place on."""
    start = rng.integers(len(text) - length + 1)
    return text[start : start + length]


def draw_pairs(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``count`` different keys, ``[count, KEY_LETTERS]``, and values, ``[count, VALUE_DIGITS]``."""
    numbers = rng.choice(len(_LETTERS) ** KEY_LETTERS, count, replace=False)
    powers = len(_LETTERS) ** np.arange(KEY_LETTERS)
    keys = _LETTERS[numbers[:, None] // powers % len(_LETTERS)].astype(np.int64)
    values = _DIGITS[rng.integers(len(_DIGITS), size=(count, VALUE_DIGITS))].astype(np.int64)
    return keys, values


def pair_line(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Tokens of the line that says a pair: mark, key, value."""
    return np.concatenate([np.frombuffer(_MARK, np.uint8).astype(np.int64), key, value])


PAIR_TOKENS = len(_MARK) + KEY_LETTERS + VALUE_DIGITS


@dataclass
class Questions:
    """Texts, and questions that each text alone answers.

    ``questions`` holds what is given and the answer, ``PASSAGE_GIVEN`` or ``len("\\n@") +
    KEY_LETTERS`` and ``answer_tokens``.
    """

    task: str
    contexts: np.ndarray  # [num_contexts, num_tokens] int64
    questions: np.ndarray  # [num_contexts, num_questions, question_tokens] int64
    answer_tokens: int  # the last ones of each question
    positions: np.ndarray  # [num_contexts, num_questions], of the first answering token in the text


def gen_data_questions(
    text: np.ndarray,
    task: str,
    num_contexts: int,
    num_questions: int,
    num_tokens: int,
    seed: int,
    *,
    first: int = 32,
    last: int = 96,
) -> Questions:
    """Draw texts and questions.

    Parameters
    ----------
    text : numpy.ndarray
        Tokens of real text.
    task : str
        "passkey": one pair per text, the question repeats its key, so there is one question per
        text. "pairs": ``num_questions`` pairs per text, each asked for. "passage": passages of the
        text itself, of which the question repeats the beginning. "letters": the same with passages
        of letters and digits by chance, put into the text.
    num_contexts, num_questions, num_tokens, seed : int
        Numbers of texts, questions of each and tokens of each.
    first, last : int
        Tokens at the beginning and at the end of the text where no answer is: more than what a
        selection is forced to hold.

    Notes
    -----
    Answers are in equal stretches of the text, one in each at a place drawn uniformly, so that
    together they lie uniformly between `first` and `last`.
    """
    rng = np.random.default_rng([seed, TASKS[task]])
    if task == "passkey":
        num_questions = 1
    is_passage = task in ("passage", "letters")
    contexts, questions, positions = [], [], []
    for _ in range(num_contexts):
        length = PASSAGE_GIVEN + PASSAGE_ANSWER if is_passage else PAIR_TOKENS
        edges = np.linspace(first, num_tokens - last - length, num_questions + 1).astype(int)
        places = rng.integers(edges[:-1], np.maximum(edges[1:] - length, edges[:-1] + 1))
        context = window_of(text, num_tokens, rng).copy()
        where = places[:, None] + np.arange(length)
        if task == "passage":
            asked = context[where]
        elif task == "letters":
            asked = rng.choice(_SIGNS, where.shape)
        else:
            keys, values = draw_pairs(num_questions, rng)
            asked = np.stack([pair_line(k, v) for k, v in zip(keys, values, strict=True)])
        context[where] = asked
        start = PASSAGE_GIVEN if is_passage else PAIR_TOKENS - VALUE_DIGITS
        contexts.append(context)
        questions.append(asked)
        positions.append(places + start)
    answer_tokens = PASSAGE_ANSWER if is_passage else VALUE_DIGITS
    return Questions(
        task, np.stack(contexts), np.stack(questions), answer_tokens, np.stack(positions)
    )


def gen_data_training(
    text: np.ndarray, batch: int, num_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Texts in which much is said twice.

    Pairs are scattered over the text and said again, some of them several times; passages of the
    text are copied to a later place in it.

    Returns
    -------
    tokens : numpy.ndarray
        ``[batch, num_tokens]`` int64.
    kinds : numpy.ndarray
        ``[batch, num_tokens]`` int64, what each token is: `NOISE`, which nothing predicts, `TEXT`,
        or what has been said before in the same text: of a `PAIR` or of a `PASSAGE`.
    """
    tokens = np.stack([window_of(text, num_tokens, rng) for _ in range(batch)])
    kinds = np.full(tokens.shape, TEXT)
    for row, kind in zip(tokens, kinds, strict=True):
        # Not both in one text, where one would overwrite what the other repeats.
        (_repeat_passages if rng.random() < 0.5 else _say_pairs)(row, kind, rng)
    return tokens, kinds


def _repeat_passages(row: np.ndarray, kind: np.ndarray, rng: np.random.Generator) -> None:
    """Copy passages of the first half to the second; some are of letters and digits by chance."""
    half = len(row) // 2
    count = int(rng.integers(1, min(half // 32, 12) + 1))
    stretch = half // count
    for number, other in enumerate(rng.permutation(count)):
        length = int(rng.integers(16, min(stretch, 64) + 1))
        first, second = (
            start + int(rng.integers(stretch - length + 1))
            for start in (number * stretch, half + other * stretch)
        )
        if rng.random() < 0.7:
            row[first : first + length] = rng.choice(_SIGNS, length)
            kind[first : first + length] = NOISE
        row[second : second + length] = row[first : first + length]
        kind[second : second + length] = kind[first : first + length]
        kind[second + PASSAGE_GIVEN // 3 : second + length] = PASSAGE


def _say_pairs(row: np.ndarray, kind: np.ndarray, rng: np.random.Generator) -> None:
    """Put pairs into the text, and ask for each of them later.

    The text is divided into slots of a pair's length; some are for pairs, the others stay text.
    """
    places = np.arange(rng.integers(PAIR_TOKENS), len(row) - PAIR_TOKENS + 1, PAIR_TOKENS)
    num_pairs = int(rng.integers(2, min(len(places) // 3, 48) + 1))
    num_asked = min(2 * num_pairs, len(places) - num_pairs)
    keys, values = draw_pairs(num_pairs, rng)
    # Most pairs are said in the first two thirds, so that distances are long.
    said = rng.choice(max(len(places) * 2 // 3, num_pairs), num_pairs, replace=False)
    free = np.setdiff1d(np.arange(said.min() + 1, len(places)), said)
    asked = rng.choice(free, min(num_asked, len(free)), replace=False)
    first_of = dict(zip(said.tolist(), range(num_pairs), strict=True))
    known: list[int] = []
    for place in np.sort(np.concatenate([said, asked])).tolist():
        at, is_new = places[place], place in first_of
        if is_new:
            known.append(first_of[place])
        pair = known[-1] if is_new else known[rng.integers(len(known))]
        row[at : at + PAIR_TOKENS] = pair_line(keys[pair], values[pair])
        kind[at : at + PAIR_TOKENS] = NOISE
        if not is_new:
            kind[at + PAIR_TOKENS - VALUE_DIGITS : at + PAIR_TOKENS] = PAIR

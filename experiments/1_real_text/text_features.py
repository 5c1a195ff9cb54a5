"""Text -> tokens -> token vectors -> keys and queries of every head. No model is involved."""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
from scipy.linalg import hadamard
from scipy.signal import lfilter
from scipy.sparse.linalg import svds

# A line break keeps the indentation behind it, since both say where in the structure one is. Other
# blanks say nothing and are dropped. Han and kana are written without blanks: one sign, one token.
_TOKEN = re.compile(r"\n[ \t]*|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d]\w*|\d+|[^\w\s]")

# The 4096 most frequent types cover some 95 % of a program's tokens. The others are hashed rather
# than merged into one "unknown": a rare name that comes back is what attention looks for.
_FREQUENT_TYPES = 4096
_HASH_BUCKETS = 2048

_WINDOW = 8

# Tests repeat themselves and the code pages are tables: neither reads like a program.
_SKIPPED_FOLDERS = {"__pycache__", "encodings", "node_modules", "site-packages", "test", "tests"}


class TextTooShortError(ValueError):
    """The text has fewer tokens, or fewer different ones, than needed."""


@dataclass(frozen=True)
class KvHead:
    """How one KV head, and the query heads that share it, see the text.

    A decay is that of the average over the preceding tokens, a share that of the token itself.
    """

    key_decay: float
    key_share: float
    query_decay: float
    query_shares: tuple[float, ...]
    sharpness: float


def qwen3_8b_heads() -> list[KvHead]:
    """8 KV heads with 4 query heads each, from local to topical.

    Queries have a shorter memory than keys and more of the token itself: they ask for what the
    current line is about, not for a passage that came about in the same way.
    """
    return [
        KvHead(
            key_decay=float(1 - 1 / memory),
            key_share=float(key_share),
            query_decay=float(1 - 6 / memory),
            query_shares=(0.4, 0.5, 0.6, 0.7),
            sharpness=2.0,
        )
        for memory, key_share in zip(
            np.geomspace(32, 80, 8), np.linspace(0.3, 0.15, 8), strict=True
        )
    ]


def default_text() -> Path:
    """Folder of the Python standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _files(path: Path, rng: np.random.Generator) -> Iterator[Path]:
    """Files of a folder in shuffled order, so that a large folder is sampled, not cut at "b"."""
    if not path.is_dir():
        yield path
        return
    pattern = "*.py" if path == default_text() else "*"
    files = [
        file
        for file in sorted(path.rglob(pattern))
        if not any(
            part in _SKIPPED_FOLDERS or part.startswith(".")
            for part in file.relative_to(path).parts
        )
    ]
    for i in rng.permutation(len(files)):
        if files[i].is_file():
            yield files[i]


def read_tokens(path: Path, num_tokens: int, seed: int) -> list[str]:
    """First ``num_tokens`` tokens of a text file, or of the text files of a folder.

    Raises
    ------
    TextTooShortError
        If there are fewer.
    OSError
        If ``path`` is a file, or is missing, and cannot be read.
    """
    tokens: list[str] = []
    for file in _files(path, np.random.default_rng(seed)):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if path.is_dir():
                continue
            text = file.read_text(encoding="utf-8", errors="replace")
        if "\0" in text:
            continue
        tokens += _TOKEN.findall(text)
        if len(tokens) >= num_tokens:
            return tokens[:num_tokens]
    raise TextTooShortError(
        f"{path} has {len(tokens):,} tokens, {num_tokens:,} are needed: "
        "give a longer text with --text, or ask for fewer with --tokens"
    )


def token_ids(tokens: list[str]) -> np.ndarray:
    """Number of each token in the text's own vocabulary, by falling frequency, then hashed."""
    frequent = [token for token, _ in Counter(tokens).most_common(_FREQUENT_TYPES)]
    numbers = {token: number for number, token in enumerate(frequent)}
    for token in set(tokens).difference(numbers):
        numbers[token] = _FREQUENT_TYPES + zlib.crc32(token.encode()) % _HASH_BUCKETS
    return np.array([numbers[token] for token in tokens])


def token_vectors(ids: np.ndarray, dim: int) -> np.ndarray:
    """Vector of every token of the text, ``[len(ids), dim]`` float32, from its co-occurrences.

    Truncated SVD of the positive pointwise mutual information (PPMI) within a window, each type
    weighted by its smooth inverse frequency (Arora et al., *A Simple but Tough-to-Beat Baseline*,
    ICLR 2017) so that brackets do not drown names, and centred.

    Raises
    ------
    TextTooShortError
        If there are no more types than dimensions.
    """
    _, types = np.unique(ids, return_inverse=True)
    counts = np.bincount(types)
    size = len(counts)
    if size <= dim:
        raise TextTooShortError(
            f"the text has only {size:,} different tokens, more than {dim:,} are needed"
        )
    cooccurrence = scipy.sparse.csr_matrix((size, size))
    for distance in range(1, _WINDOW + 1):
        pair = (types[:-distance], types[distance:])
        ones = np.ones(len(types) - distance)
        cooccurrence += scipy.sparse.csr_matrix((ones, pair), shape=(size, size))
    cooccurrence = (cooccurrence + cooccurrence.T).tocoo()

    row, col = cooccurrence.coords
    sums = np.bincount(row, cooccurrence.data, minlength=size)
    pmi = np.log(cooccurrence.data * sums.sum() / (sums[row] * sums[col]))
    positive = pmi > 0
    ppmi = scipy.sparse.csr_matrix(
        (pmi[positive], (row[positive], col[positive])), shape=(size, size)
    )
    # A fixed start makes the result, signs included, the same on every run. The default solver
    # takes seconds where this one takes a fraction.
    left, singular, _ = svds(ppmi, k=dim, v0=np.ones(size), solver="propack")
    vectors = normalised(left * np.sqrt(singular))

    frequency = counts / len(types)
    vectors *= (1e-2 / (1e-2 + frequency))[:, None]
    vectors -= frequency @ vectors
    return vectors.astype(np.float32)[types]


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1; a zero row stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def contextual(vectors: np.ndarray, decay: float) -> np.ndarray:
    """Exponential average over the tokens up to and including each one, normalised."""
    # Coefficients of the same type keep the filter from working in float64.
    average = lfilter(np.float32([1 - decay]), np.float32([1, -decay]), vectors.T.copy(), axis=-1)
    return normalised(np.ascontiguousarray(average.T))


def _mixed(own: np.ndarray, context: np.ndarray, share: float) -> np.ndarray:
    return normalised(share * own + (1 - share) * context) * np.sqrt(own.shape[-1])


def head_keys(vectors: np.ndarray, head: KvHead, rotation: np.ndarray) -> np.ndarray:
    """Keys of one KV head, ``[num_tokens, dim]`` float32, of length ``sqrt(dim)``."""
    own = normalised(vectors)
    keys = _mixed(own, contextual(vectors, head.key_decay), head.key_share)
    return (keys @ rotation).astype(np.float32)


def head_queries(
    vectors: np.ndarray, positions: np.ndarray, head: KvHead, rotation: np.ndarray
) -> np.ndarray:
    """Queries of one KV head, ``[num_positions, group_size, dim]`` float32."""
    own = normalised(vectors[positions])
    context = contextual(vectors, head.query_decay)[positions]
    queries = [_mixed(own, context, share) * head.sharpness for share in head.query_shares]
    return (np.stack(queries, axis=1) @ rotation).astype(np.float32)


def head_values(vectors: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Values of one KV head, ``[num_tokens, dim]`` float32: the tokens' own vectors."""
    return (normalised(vectors) * np.sqrt(vectors.shape[-1]) @ rotation).astype(np.float32)


def random_rotation(dim: int, rng: np.random.Generator) -> np.ndarray:
    """Orthogonal ``[dim, dim]`` matrix, so that no head's channels are those of another.

    A Hadamard matrix with random signs and order: ``dim`` is a power of 2.
    """
    signs = rng.choice([-1.0, 1.0], dim)[:, None]
    rotation = signs * hadamard(dim)[rng.permutation(dim)] / np.sqrt(dim)
    return rotation.astype(np.float32)

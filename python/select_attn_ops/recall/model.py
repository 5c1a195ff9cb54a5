"""Keys and queries of a model of Hugging Face transformers, as it reads a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .measures import Layer

_NAME = "select_attn_ops_recall"


def read(
    folder: Path, text: Path, num_tokens: int, num_steps: int, see: Callable[[int, Layer], None]
) -> int:
    """Run the text through a model densely, and show each layer's keys and last queries.

    Parameters
    ----------
    folder : Path
        The model with its tokenizer; nothing is downloaded.
    text : Path
        A file, of which the first `num_tokens` tokens are read.
    num_steps : int
        Queries per head, those of the last tokens.
    see : callable
        Called with the number of each full-attention layer and what it sees. Layers with a
        sliding window are left out.

    Returns
    -------
    int
        Tokens that were read.
    """
    if not folder.is_dir():
        raise ValueError(f"--model must be a folder, got {folder}")
    if not text.is_file():
        raise ValueError(f"--text must be a file, got {text}")
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text} must be in UTF-8: {error}") from error
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"--model needs transformers: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--model {folder} does not load: {error}") from error
    tokens = tokenizer(words, return_tensors="pt").input_ids
    if tokens.shape[1] == 0:
        # Without a tokenizer's files transformers makes one that knows no words.
        raise ValueError(f"--model {folder} has no tokenizer for this text, or the text is empty")
    return capture(model, tokens[:, :num_tokens], num_steps, see)


def capture(
    model: Any, tokens: torch.Tensor, num_steps: int, see: Callable[[int, Layer], None]
) -> int:
    """As `read`, with a loaded model and ``[1, num_tokens]`` tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from ..integrations.transformers import IGNORED_BY_SDPA, ONLY_BY_SDPA, refuse

    num_tokens = tokens.shape[1]
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"--steps must be in [1, {num_tokens}] for this text, got {num_steps}")
    positions = torch.arange(num_tokens - num_steps, num_tokens)
    sdpa = AttentionInterface()["sdpa"]

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        refuse(IGNORED_BY_SDPA + ONLY_BY_SDPA, kwargs)  # they would change the mass
        if kwargs.get("sliding_window") is None:
            last = query[0, :, -num_steps:]
            see(module.layer_idx, Layer(key[0], last, positions, scaling))
        return sdpa(module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with torch.no_grad():
            model(tokens, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return num_tokens

"""Keys and queries from files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .measures import Layer

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load(path: Path, name: str) -> torch.Tensor:
    """The tensor of a .npy file, or the one of a .safetensors file that is called `name`."""
    if not path.is_file():
        raise ValueError(f"--{name} must be a file, got {path}")
    if path.suffix == ".npy":
        import numpy

        try:
            return torch.from_numpy(numpy.load(path, allow_pickle=False))
        except (EOFError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"--{name} {path} does not load: {error}") from error
    if path.suffix != ".safetensors":
        raise ValueError(f"--{name} must end in .npy or .safetensors, got {path}")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = sorted(file.keys())
            if name not in names and len(names) != 1:
                raise ValueError(f"{path} must have one tensor, or one named {name}, got {names}")
            tensor: Any = file.get_tensor(name if name in names else names[0])
    except SafetensorError as error:
        raise ValueError(f"--{name} {path} does not load: {error}") from error
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _with_layers(name: str, tensor: torch.Tensor, words: str) -> torch.Tensor:
    if tensor.ndim not in (3, 4):
        raise ValueError(f"{name} must be [{words}] or [layers, {words}], got {list(tensor.shape)}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if not tensor.numel():
        raise ValueError(f"{name} must not be empty, got {list(tensor.shape)}")
    return tensor if tensor.ndim == 4 else tensor[None]


def layers(
    keys: torch.Tensor, queries: torch.Tensor, positions: torch.Tensor | None
) -> Iterator[Layer]:
    """Check the tensors at once, and hand out their layers.

    Parameters
    ----------
    keys : torch.Tensor
        ``[num_kv_heads, num_tokens, head_dim]``, or that with the layers in front.
    queries : torch.Tensor
        ``[num_heads, num_steps, head_dim]``, or that with the layers in front.
    positions : torch.Tensor, optional
        ``[num_steps]`` integers, the token of each query. Default: the last ones.
    """
    keys = _with_layers("keys", keys, "num_kv_heads, num_tokens, head_dim")
    queries = _with_layers("queries", queries, "num_heads, num_steps, head_dim")
    if keys.dtype != queries.dtype:
        raise ValueError(f"queries must be {keys.dtype} as the keys, got {queries.dtype}")
    num_layers, num_kv_heads, num_tokens, head_dim = keys.shape
    if queries.shape[0] != num_layers or queries.shape[3] != head_dim:
        raise ValueError(
            f"queries must be [{num_layers}, *, *, {head_dim}] as the keys, "
            f"got {list(queries.shape)}"
        )
    if queries.shape[1] % num_kv_heads:
        raise ValueError(
            f"the query heads must be a multiple of the {num_kv_heads} KV heads, "
            f"got {queries.shape[1]}"
        )
    num_steps = queries.shape[2]
    if positions is None:
        if num_steps > num_tokens:
            raise ValueError(f"expected at most {num_tokens} queries per head, got {num_steps}")
        positions = torch.arange(num_tokens - num_steps, num_tokens)
    if positions.is_floating_point() or positions.shape != (num_steps,):
        raise ValueError(
            f"positions must be [{num_steps}] integers, "
            f"got {list(positions.shape)} {positions.dtype}"
        )
    if int(positions.min()) < 0 or int(positions.max()) >= num_tokens:
        raise ValueError(
            f"positions must be in [0, {num_tokens}), "
            f"got {int(positions.min())} to {int(positions.max())}"
        )
    for name, tensor in (("keys", keys), ("queries", queries)):
        if not all(bool(part.isfinite().all()) for part in tensor):
            raise ValueError(f"{name} must be finite, got infinities or NaN")
    positions = positions.long()
    return (Layer(k, q, positions) for k, q in zip(keys, queries, strict=True))

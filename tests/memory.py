"""The bytes behind arguments, to see what a call has written."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common.layouts import whole_storage


def snapshot(arguments: dict[str, Any]) -> dict[str, bytes]:
    """Return every byte that the tensors among ``arguments`` can reach, around them included."""
    return {name: held for name, value in arguments.items() if (held := _bytes(value)) is not None}


def _bytes(value: Any) -> bytes | None:
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        if isinstance(value.base, torch.Tensor):
            return _bytes(value.base)
        return value.tobytes()
    tensor = getattr(value, "tensor", value)
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    return whole_storage(tensor.detach()).view(torch.uint8).numpy().tobytes()

"""The operators as torch custom ops.

Eager calls go straight to the library. Under torch.compile and export, and for tensors without
memory of their own (fake, meta), torch must see an operator with a schema instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._library import torch


def takes_over(tensor: Any) -> bool:
    """Whether a call with this tensor must go through torch's dispatcher."""
    if torch is None:
        return False
    if torch.compiler.is_compiling():
        return True
    kind = type(tensor)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return bool(tensor.is_meta)
    return isinstance(tensor, torch.Tensor)


def register(schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Register `function`, which writes its results into arguments, under torch.ops.

    Parameters
    ----------
    schema : str
        Name, arguments and results as torch spells them; ``(a!)`` marks what is written.
    function : Callable
        The implementation, positional.

    Returns
    -------
    Callable
        What to call where `takes_over` says so.
    """
    if torch is None:
        return function
    name, arguments = schema.split("(", 1)
    written = [part.split()[-1] for part in arguments.split(",") if "!)" in part]
    op = torch.library.custom_op(
        f"select_attn_ops::{name}", function, mutates_args=written, schema="(" + arguments
    )
    op.register_fake(lambda *_args: None)  # the results are arguments: nothing to infer
    return op  # type: ignore[no-any-return]

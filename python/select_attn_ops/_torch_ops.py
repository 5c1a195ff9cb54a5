"""The operators as torch custom ops.

Eager calls go straight to the library. Under torch.compile and export, and for tensors without
memory of their own (fake, meta), torch must see an operator with a schema instead.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from ._library import is_torch, torch


def takes_over(tensors: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments must go through torch's dispatcher."""
    # First, because what follows is the process's state: another thread's torch.compile must not
    # take a call that has nothing to do with torch.
    if not any(is_torch(tensor) for tensor in tensors):
        return False
    if torch.compiler.is_compiling() or _is_traced():
        return True
    for tensor in tensors:
        kind = type(tensor)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if tensor.is_meta:
                return True
        elif is_torch(tensor):
            return True
    return False


def _is_traced() -> bool:
    """Whether anything but the eager kernels wants to see the call: make_fx, jit, functorch."""
    return bool(
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def register(schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Register `function`, which writes its results into arguments, under torch.ops.

    Parameters
    ----------
    schema : str
        Name, arguments and results as torch spells them; ``(a!)`` marks what is written.
    function : Callable
        The implementation. Its positional parameters are the schema's arguments.

    Returns
    -------
    Callable
        What to call where `takes_over` says so.
    """
    if torch is None or not hasattr(torch.library, "custom_op"):  # before torch 2.4
        return function
    op_name, arguments = schema.split("(", 1)
    written = re.findall(r"!\)\??\s+(\w+)", arguments)
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
    op = torch.library.custom_op(
        f"select_attn_ops::{op_name}", function, mutates_args=written, schema="(" + arguments
    )

    # The results are arguments, so there is nothing to infer; but without memory nobody else looks.
    def check_devices(*values: Any) -> None:
        for name, value in zip(names, values, strict=True):
            if isinstance(value, torch.Tensor) and value.device != values[0].device:
                raise ValueError(
                    f"{name} must be on {values[0].device} like {names[0]}, got {value.device}"
                )

    op.register_fake(check_devices)
    return op  # type: ignore[no-any-return]

"""The operators as torch custom ops.

Eager calls go straight to the library. Under torch.compile and export, and for tensors without
memory of their own (fake, meta), torch must see an operator with a schema instead.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

from ._library import is_torch, mark_torch_written, torch


def _private(name: str) -> Callable[[], object]:
    """Return a private function of torch's; where it is gone, one that always has a result."""
    try:
        function: Callable[[], object] = operator.attrgetter(name)(torch)
    except AttributeError:
        return lambda: True
    return function


# The classes of torch's own tensors: any other may want to see a call, or to refuse it.
_PLAIN_TYPES: frozenset[type] = frozenset()
if torch is not None:
    _PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
    # What they return is true while somebody wants to see every call: make_fx, jit, functorch.
    # If a torch has one of them no more, calls go through its dispatcher, which is always right.
    _dispatch_modes = _private("_C._len_torch_dispatch_stack")
    _tracing_state = _private("_C._get_tracing_state")
    _functorch_stack = _private("_C._functorch.peek_interpreter_stack")


def call_directly(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    tensors: tuple[Any, ...],
    written: tuple[Any, ...],
) -> bool:
    """Make the usual call, on torch's own tensors on the CPU, with as few questions as possible.

    For a small batch the questions that the long way asks, `takes_over` and `argument`, take
    longer than everything else. Whatever is unusual or wrong is left to it and its messages.

    Parameters
    ----------
    function : Callable
        A function of the library.
    arguments : tuple
        Its arguments.
    tensors : tuple
        The tensors among them, first the one whose device counts; None for one left out.
    written : tuple
        The tensors that `function` writes.

    Returns
    -------
    bool
        Whether the call is done. If not, it is still to be made: nothing is written, or what
        was before memory ran out, which the call will write again.
    """
    if torch is None or torch.compiler.is_compiling() or _is_traced():
        return False
    for tensor in tensors:
        if type(tensor) in _PLAIN_TYPES:
            # Whatever else makes a tensor unfit, torch or the library refuses it below.
            if tensor.is_neg():
                return False
        elif tensor is not None:
            return False
    if tensors[0] is None or not tensors[0].is_cpu:
        return False
    for tensor in written:
        if tensor is None or tensor.requires_grad:
            return False
    try:
        function(*arguments)
    except Exception:  # the long way meets it again, with the argument's name
        return False
    mark_torch_written(written)
    return True


def takes_over(tensors: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments must go through torch's dispatcher."""
    # First, because what follows is the process's state: another thread's torch.compile must not
    # take a call that has nothing to do with torch.
    if not any(is_torch(tensor) for tensor in tensors):
        return False
    if torch.compiler.is_compiling() or _is_traced():
        return True
    for tensor in tensors:
        if type(tensor) in _PLAIN_TYPES:
            if tensor.is_meta:
                return True
        elif is_torch(tensor):
            return True
    return False


def _is_traced() -> bool:
    """Whether anything but the eager kernels wants to see the call."""
    return bool(_dispatch_modes() or _tracing_state() or _functorch_stack())


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

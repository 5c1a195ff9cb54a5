"""What the native library is and has: version, backends, SIMD targets, threads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from ._library import LIB, TEXTS, integer


@dataclass(frozen=True)
class Backend:
    """One of the devices that the library has, or could have, operators for."""

    name: str
    """``cpu``, ``cuda`` or ``ascend``."""
    available: bool
    """Whether its operators can be called."""
    description: str
    """What it runs on, or why it is not available."""


def version() -> str:
    """Version of the native library."""
    return _text("version")


def backends() -> list[Backend]:
    """Every backend the library knows, the CPU first."""
    LIB.simd_target()  # raises what the environment has wrong
    LIB.num_threads()
    lines = _text("backends").splitlines()
    return [
        Backend(name, state == "available", description)
        for name, state, description in zip(lines[0::3], lines[1::3], lines[2::3], strict=True)
    ]


def get_num_threads() -> int:
    """Threads that a call on the CPU may use, the caller included.

    By default the value of the environment variable ``SELECT_ATTN_NUM_THREADS``, or else the
    number of processors that the process may run on.

    Raises
    ------
    ValueError
        If the environment variable is not a number in [1, 65536].
    """
    return int(LIB.num_threads())


def set_num_threads(count: int) -> None:
    """Set the threads that a call on the CPU may use, for the whole process.

    The result of an operator does not depend on it.

    Parameters
    ----------
    count : int
        At least 1, the caller included.

    Raises
    ------
    ValueError
        If `count` is not in [1, 65536].
    """
    LIB.set_num_threads(integer("count", count))


def simd_targets() -> list[str]:
    """SIMD targets of the CPU kernels that this machine can run, best first."""
    return _text("simd_targets").splitlines()


def simd_target() -> str:
    """The SIMD target in use: the best, or the one that ``SELECT_ATTN_SIMD_TARGET`` names."""
    return simd_targets()[int(LIB.simd_target())]


def set_simd_target(name: str | None) -> None:
    """Force a SIMD target, for tests and bug reports; None goes back to the best one.

    Not while another thread is inside a call.

    Raises
    ------
    ValueError
        If `name` is not one of `simd_targets`.
    """
    names = simd_targets()
    if name is not None and name not in names:
        raise ValueError(f"the SIMD target must be one of {', '.join(names)}, got {name}")
    LIB.set_simd_target(-1 if name is None else names.index(name))


def _text(name: str) -> str:
    function = getattr(TEXTS, f"select_attn_ops_{name}")
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode()
